"""Frozen inference: what `vitfast.prepare` makes of a model."""
