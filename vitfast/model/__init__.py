"""The Vision Transformer as PyTorch modules."""
