"""`python -m mixmae.launch.backends.slurm_job_steps STEP`: the steps of a batch script around its ranks."""

import argparse
import asyncio
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mixmae.base.errors import run_cli
from mixmae.base.exit_codes import FAILED
from mixmae.base.hostlist import expand
from mixmae.base.ownership import evict
from mixmae.base.run_directory import LOGS, attempt_folder
from mixmae.launch.supervision.outcome import Outcome, read_outcome
from mixmae.launch.supervision.protocol import connect
from mixmae.launch.supervision.restarts import Decision, decide, print_outcome, record_restart
from mixmae.launch.supervision.token import TOKEN

REQUEUE = "requeue"
"""Printed by `end` if the job is to be requeued."""


def hosts(args: argparse.Namespace) -> int:
    """Prints the job's nodes, a line each, where scontrol does not."""
    print("\n".join(expand(os.environ["SLURM_JOB_NODELIST"])))
    return 0


def begin(args: argparse.Namespace) -> int:
    """Records a restart, and how the start before it ended, whoever requeued the job; the first takes the run over."""
    if args.take_over and not args.restarts:
        evict(args.run_dir)
    if args.restarts:
        ours = re.compile(rf".*-{re.escape(args.launch)}-{args.restarts - 1}")
        earlier = [folder for folder in sorted((args.run_dir / LOGS).iterdir()) if ours.fullmatch(folder.name)]
        outcome = read_outcome(earlier[-1]) if earlier else None
        name = earlier[-1].name if earlier else ""
        record_restart(args.run_dir, args.launch, name, outcome, slurm_restart_count=args.restarts)
    return 0


def stop(args: argparse.Namespace) -> int:
    """Forwards a signal to all ranks; fails if the coordinator cannot be reached."""
    return 0 if asyncio.run(_say(os.environ["MASTER_ADDR"], args.port, args.signal)) else 1


async def _say(address: str, port: int, signal: str) -> bool:
    connection = await connect(address, port, os.environ[TOKEN])
    if connection is None:
        return False
    connection.send("stop", signal=signal)
    await connection.close()
    return True


def end(args: argparse.Namespace) -> int:
    """Prints the outcome, and on standard output whether to requeue; returns the run's exit code."""
    folder = attempt_folder(args.run_dir, args.attempt)
    outcome = read_outcome(folder) or Outcome(
        FAILED, f"rank 0's supervisor left no record: it was killed, or never started; see above, and {folder}"
    )
    decision = Decision(False)
    if args.job_state == "RUNNING":  # else somebody cancelled it, or requeues it already
        decision = decide(args.run_dir, args.launch, outcome, args.max_restarts)
    print_outcome(outcome, decision)
    if decision.restart:
        print(REQUEUE, flush=True)
        return outcome.code
    return decision.exit_code(outcome)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae.launch.backends.slurm_job_steps", description=__doc__)
    steps = parser.add_subparsers(required=True, metavar="hosts|begin|stop|end")
    for step in (hosts, begin, stop, end):
        own = steps.add_parser(step.__name__, help=step.__doc__)
        own.add_argument("--run-dir", type=Path, required=True)
        own.add_argument("--attempt", required=True)
        own.set_defaults(step=step)
        if step is stop:
            own.add_argument("--port", type=int, required=True)
            own.add_argument("--signal", required=True)
        elif step is not hosts:
            own.add_argument("--launch", required=True, help="the same for all starts of a job")
    steps.choices["begin"].add_argument("--restarts", type=int, required=True)
    steps.choices["begin"].add_argument("--take-over", action="store_true")
    steps.choices["end"].add_argument("--max-restarts", type=int, required=True)
    steps.choices["end"].add_argument("--job-state", required=True, help="as squeue says")
    args = parser.parse_args(argv)
    return int(args.step(args))


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
