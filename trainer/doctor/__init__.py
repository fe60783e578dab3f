"""Preflight checks of hosts, GPUs, network, storage and shards, run from all ranks."""
