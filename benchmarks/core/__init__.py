"""Benchmarks that check before they time. `vitfast bench` runs them; see `vitfast.bench.harness`."""
