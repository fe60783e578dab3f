"""`python -m tests.launch.launch_stand_in RECIPE ...`: `mixmae launch` of ranks that stand in for those that train."""

import sys

from mixmae.base.errors import run_cli
from mixmae.launch.commands import launch

if __name__ == "__main__":
    launch.TRAINER = "tests.launch.stand_in"
    sys.exit(run_cli(launch.main, sys.argv[1:]))
