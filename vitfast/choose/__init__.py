"""Which implementation a call of an op runs, and who says so."""
