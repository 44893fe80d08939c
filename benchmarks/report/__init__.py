"""Tables and pictures of README and docs, from the records."""
