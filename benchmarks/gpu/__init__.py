"""Tests, times and tables on a GPU that is lent for minutes."""
