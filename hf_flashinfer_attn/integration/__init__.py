"""Entry points for transformers and torch.compile: mask and attention functions, ops, registration."""
