"""State on disk: the buckets of a folder, and the memory through which they pass while a run steps."""
