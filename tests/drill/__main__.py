"""The drill as a command: faults by seed, in some or all ways, and the page that tells of them."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mixmae.base.errors import UsageError, run_in_words
from tests.cluster import programs
from tests.cluster.cluster import bring_up
from tests.drill.faults import WAYS, all_faults
from tests.drill.report import write_report
from tests.drill.rig import Rig
from tests.drill.runs import clean_environment
from tests.drill.session import play_all


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.drill", description=__doc__)
    parser.add_argument("--faults", type=int, default=60, metavar="N", help="how many (60)")
    parser.add_argument("--seed", type=int, default=0, help="draws faults, ranks, steps and moments (0)")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of starting runs ({','.join(WAYS)})")
    parser.add_argument("--only", default="", metavar="NAME,...", help="of these faults alone")
    parser.add_argument("--report", type=Path, help="write the page there")
    parser.add_argument("--list", action="store_true", help="list all faults, and do nothing")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(f"{fault.name:<36} {fault.words} ({', '.join(fault.ways)})" for fault in all_faults()))
        return 0
    ways = args.ways.split(",")
    if unknown := [way for way in ways if way not in WAYS]:
        raise UsageError(f"--ways {args.ways}: {unknown[0]!r} is none of {', '.join(WAYS)}")
    if lacking := programs.missing():
        raise UsageError(lacking)
    clean_environment()
    cluster = bring_up(f"drill-{os.getpid()}", hosts=3, slots=2, with_parent=True)
    rig = Rig(cluster, cluster.shared)
    try:
        outcomes = play_all(rig, args.seed, args.faults, ways, args.only.split(",") if args.only else None)
        if args.report is not None:
            write_report(args.report, outcomes, _command(args), rig.start_seconds)
    finally:
        cluster.down()
    broken = [outcome for outcome in outcomes if outcome.problems]
    print(f"{len(outcomes) - len(broken)} of {len(outcomes)} held")
    return 1 if broken else 0


def _command(args: argparse.Namespace) -> str:
    return f"python -m tests.drill --faults {args.faults} --seed {args.seed} --ways {args.ways}"


if __name__ == "__main__":
    sys.exit(run_in_words(main, sys.argv[1:]))
