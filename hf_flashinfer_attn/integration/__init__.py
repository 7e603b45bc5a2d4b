"""Entry points of transformers and torch.compile: mask and attention functions, ops, registration."""
