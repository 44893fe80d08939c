"""Clocks, devices and machines, of which benchmarks and warm-up know through this package only."""
