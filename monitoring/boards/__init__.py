"""Every panel, once: monitoring.grafana makes dashboards of them, monitoring.consoles a page for Prometheus alone."""

from monitoring.boards import checkpoints, data, overview, ranks

BOARDS = (overview.BOARD, ranks.BOARD, data.BOARD, checkpoints.BOARD)
