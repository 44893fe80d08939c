"""timm's model names, keywords and entries: what they stand for here."""
