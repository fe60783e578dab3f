"""What `mixmae watch` shows: a run's events, its ranks' metrics and its firing alerts."""
