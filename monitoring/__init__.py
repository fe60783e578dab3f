"""What can be seen of a run: its metrics, their exporter, dashboards, rules and alerts, and the terminal view."""
