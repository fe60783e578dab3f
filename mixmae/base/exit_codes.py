"""Exit codes of a rank, for whoever started it. No torch."""

FINISHED = 0
FAILED = 1
MISTAKE = 2
"""Of the one who typed the command; the last line on standard error says which."""
PREEMPTED = 85
"""Asked to stop (a signal, the end of its time), saved, and to be continued by starting the same command again."""
