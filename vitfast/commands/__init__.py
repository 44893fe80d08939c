"""The `vitfast` command."""
