"""Every panel, once: mixmae.monitoring.boards.grafana makes dashboards of them, mixmae.monitoring.boards.console a page for Prometheus alone."""

from mixmae.monitoring.boards import checkpoints, data, overview, ranks

BOARDS = (overview.BOARD, ranks.BOARD, data.BOARD, checkpoints.BOARD)
