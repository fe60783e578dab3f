"""Command line of the fault drill: injects faults drawn by seed and writes the report."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mixmae.base.errors import UsageError, run_cli
from tests.cluster import programs
from tests.cluster.cluster import bring_up
from tests.drill.faults import BACKENDS, all_faults
from tests.drill.report import write_report
from tests.drill.rig import Rig
from tests.drill.runs import clean_environment
from tests.drill.session import run_drills


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.drill", description=__doc__)
    parser.add_argument("--faults", type=int, default=60, metavar="N", help="number of faults to inject (60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of faults, ranks, steps and delays (0)")
    parser.add_argument(
        "--backends", default=",".join(BACKENDS), help=f"backends to launch runs with ({','.join(BACKENDS)})"
    )
    parser.add_argument("--only", default="", metavar="NAME,...", help="inject these faults only")
    parser.add_argument("--report", type=Path, help="write the report to this file")
    parser.add_argument("--list", action="store_true", help="list all faults and exit")
    args = parser.parse_args(argv)
    if args.list:
        print(
            "\n".join(f"{fault.name:<36} {fault.description} ({', '.join(fault.backends)})" for fault in all_faults())
        )
        return 0
    backends = args.backends.split(",")
    if unknown := [backend for backend in backends if backend not in BACKENDS]:
        raise UsageError(
            f"--backends {args.backends}: unknown backend {unknown[0]!r}, expected one of {', '.join(BACKENDS)}"
        )
    if problem := programs.missing():
        raise UsageError(problem)
    clean_environment()
    cluster = bring_up(f"drill-{os.getpid()}", hosts=3, slots=2, with_parent=True)
    rig = Rig(cluster, cluster.shared)
    try:
        outcomes = run_drills(rig, args.seed, args.faults, backends, args.only.split(",") if args.only else None)
        if args.report is not None:
            write_report(args.report, outcomes, _command(args), rig.start_seconds)
    finally:
        cluster.down()
    failed = [outcome for outcome in outcomes if outcome.problems]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} passed")
    return 1 if failed else 0


def _command(args: argparse.Namespace) -> str:
    return f"python -m tests.drill --faults {args.faults} --seed {args.seed} --backends {args.backends}"


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
