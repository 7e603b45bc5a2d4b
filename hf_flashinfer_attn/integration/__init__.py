"""What transformers and torch.compile call."""
