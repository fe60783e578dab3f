"""Starting runs: the command line, backends that start ranks, preflight checks, supervision of ranks."""
