"""Heads: what stands on an encoder where it is trained with labels, and their losses."""
