"""The phases of a rank, as heartbeats and metrics report them."""

STEP_PHASES = ("data_wait", "forward", "backward", "optimizer", "logging", "evaluation", "checkpoint")
"""Phases of a step. Backward and optimizer include the communication that they start and wait for."""
PHASES = ("starting", *STEP_PHASES, "between", "ending")
"""`starting` is before the first step, `between` the rest of a step, `ending` after the last."""
