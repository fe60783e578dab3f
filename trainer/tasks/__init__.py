"""What a run does: the contract of a task, and the tasks. Loop, engine, checkpoints and telemetry know the contract."""
