"""Every panel, once: `grafana` makes dashboards of them, `console` a page for Prometheus alone."""

from mixmae.monitoring.boards import checkpoints, data, overview, ranks

BOARDS = (overview.BOARD, ranks.BOARD, data.BOARD, checkpoints.BOARD)
