"""Building, indexing, checking and repairing WebDataset shards."""
