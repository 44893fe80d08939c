"""What times this package: `python -m benchmarks`."""
