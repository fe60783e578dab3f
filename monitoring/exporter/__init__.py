"""A node's Prometheus exporter: ranks record metrics in shared memory, a process beside them serves them over HTTP."""
