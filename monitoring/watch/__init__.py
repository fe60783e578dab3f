"""The data behind `mixmae watch`: a run's events, metrics of its ranks and firing alerts."""
