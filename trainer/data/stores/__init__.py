"""Reading byte ranges of shards from file systems, URLs and commands."""
