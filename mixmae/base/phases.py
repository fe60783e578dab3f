"""What a rank can be at: its phases, as heartbeats and metrics tell them."""

STEP_PHASES = ("data_wait", "forward", "backward", "optimizer", "logging", "checkpoint")
"""Parts of a step's time. Backward and optimizer hold the communication that they start and wait for."""
PHASES = ("starting", *STEP_PHASES, "between", "ending")
"""In `starting` no step was done yet, `between` is the rest of a step."""
