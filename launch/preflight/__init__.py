"""Checks before a start: from the login node, then by a short job on all ranks."""
