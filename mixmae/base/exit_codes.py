"""Exit codes of ranks and commands."""

FINISHED = 0
FAILED = 1
USAGE_ERROR = 2
"""A wrong command line or recipe; the last line on standard error says what."""
PREEMPTED = 85
"""Stopped by a signal or the end of its time, and saved; the same command continues it."""
