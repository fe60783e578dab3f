"""Where ranks run: on this machine, on the hosts of a hostfile, or under Slurm."""
