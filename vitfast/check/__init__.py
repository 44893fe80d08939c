"""Whether results are right, and who is faster: the rule, and what is held to it."""
