"""Reading, converting and writing checkpoints."""
