"""Two models stage by stage: where they differ, and by which substitution they agree."""
