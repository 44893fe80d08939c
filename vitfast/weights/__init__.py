"""Weights: their names in several libraries, whether they fit a model, positions on another grid."""
