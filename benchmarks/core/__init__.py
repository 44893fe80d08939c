"""Rows of ops and models beside their rivals, checked before they are timed by `vitfast.check.compare`."""
