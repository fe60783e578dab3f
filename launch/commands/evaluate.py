"""`mixmae evaluate MODEL SHARDS`: in this process, or with `--local N` by N supervised ranks on this machine."""

import argparse
import importlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mixmae.launch.backends.job_spec import JobSpec, new_attempt
from mixmae.launch.backends.options import local_backend
from mixmae.launch.supervision.launcher import run_attempt

MODULE = "mixmae.trainer.evaluation.evaluate"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae evaluate", add_help=False, allow_abbrev=False)
    parser.add_argument("--local", type=int)
    args, arguments = parser.parse_known_args(argv)
    if args.local is None:
        return int(importlib.import_module(MODULE).main(arguments))
    backend = local_backend(args.local)
    with tempfile.TemporaryDirectory(prefix="mixmae-evaluate-") as name:
        folder = Path(name)
        job = JobSpec(MODULE, arguments, folder)
        attempt = new_attempt(job)
        return run_attempt(backend.command(job, attempt, os.environ), backend, attempt, folder, show=True).code
