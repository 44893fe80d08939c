"""timm's model names and keywords, and `create_model`."""
