"""The version of the package, which builds read without importing it."""

__version__ = "0.1.0"
