"""A supervisor beside each rank: failures, stuck runs, stops and restarts."""
