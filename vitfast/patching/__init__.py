"""Ops inside models of other libraries, in place: `vitfast.patch`, `unpatch`, `patched`."""
