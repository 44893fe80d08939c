"""Models made from weights of any origin, and written under other libraries' names."""
