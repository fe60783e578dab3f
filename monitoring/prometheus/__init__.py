"""Prometheus and Alertmanager on one machine, configured for some run directories."""
