"""`python -m tests.launch.launch_fake_ranks RECIPE ...`: `mixmae launch` of fake ranks that do not train."""

import sys

from mixmae.base.errors import run_cli
from mixmae.launch.commands import launch

if __name__ == "__main__":
    launch.TRAINER = "tests.launch.fake_rank"
    sys.exit(run_cli(launch.main, sys.argv[1:]))
