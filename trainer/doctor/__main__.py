"""Checks a cluster from all its ranks: `python -m mixmae.trainer.doctor [RECIPE] [key=value ...]` under any launcher.

`mixmae doctor` starts it; deepspeed, torchrun and srun do as well.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist
from rich.console import Console

from mixmae.base.errors import run_rank
from mixmae.base.exit_codes import FAILED, FINISHED
from mixmae.trainer.doctor.checks import run_checks
from mixmae.trainer.doctor.cluster import Cluster
from mixmae.trainer.doctor.follower import FULL, SHORT, ProbeLimits, follow
from mixmae.trainer.doctor.main_rank import MainRank
from mixmae.trainer.doctor.message_store import MessageStore, NoAnswerError
from mixmae.trainer.doctor.protocol.findings import exit_code, print_findings
from mixmae.trainer.doctor.protocol.link import link_rate
from mixmae.trainer.engine import distributed
from mixmae.trainer.engine.distributed import Ranks, read_ranks
from mixmae.trainer.recipe.arguments import add_recipe, at_least
from mixmae.trainer.recipe.loading import load_recipe
from mixmae.trainer.recipe.schema import Recipe


class TerminatedError(BaseException):
    """Raised on SIGTERM to interrupt any wait; only `_lead` catches it."""


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_intermixed_args(argv)
    recipe = load_recipe(args.recipe, args.overrides) if args.recipe is not None else None
    ranks = read_ranks(os.environ)
    limits = SHORT if args.short else FULL
    if not ranks.is_main:
        return _follow(ranks, recipe, limits)
    cluster = Cluster(args.world_size, ranks.world_size, (), (), recipe, link=args.link)
    return _lead(MainRank(ranks, limits, cluster), args.jsonl)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mixmae.trainer.doctor", description=__doc__)
    add_recipe(parser, optional=True, without="only hosts and network are checked")
    parser.add_argument("--world-size", type=at_least(1), metavar="N", help="expected number of ranks")
    parser.add_argument("--link", type=link_rate, help="expected network bandwidth, such as 200gbps")
    parser.add_argument("--short", action="store_true", help="only checks that take a few seconds")
    parser.add_argument("--jsonl", action="store_true", help="print findings as JSON, one a line, instead of a table")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    return parser


def _lead(lead: MainRank, as_json: bool) -> int:
    def terminate(*_: object) -> None:
        raise TerminatedError

    signal.signal(signal.SIGTERM, terminate)
    try:
        lead.run(on_timeout=lambda: os._exit(_print(lead.cluster, as_json)))
    except TerminatedError:  # the launcher ends all ranks because one failed
        return _print(replace(lead.cluster, interrupted=True), as_json)
    code = _print(lead.cluster, as_json)
    lead.end()
    return code


def _print(cluster: Cluster, as_json: bool) -> int:
    """Runs the checks and prints their findings; returns the exit code."""
    findings = run_checks(cluster)
    if as_json:
        print("\n".join(finding.to_json() for finding in findings))
    else:
        print_findings(findings, Console(highlight=False))
    sys.stdout.flush()
    return exit_code(findings)


def _follow(ranks: Ranks, recipe: Recipe | None, limits: ProbeLimits) -> int:
    messages = MessageStore(ranks)
    try:
        follow(messages, ranks, recipe, limits)
    except (NoAnswerError, dist.DistError) as error:
        reason = str(error).splitlines()[0]
        print(f"mixmae: rank {ranks.rank}: the main rank ended early ({reason})", file=sys.stderr, flush=True)
        return FAILED
    return FINISHED


if __name__ == "__main__":
    code = run_rank(main, sys.argv[1:])
    distributed.leave(FAILED if code == FINISHED and dist.is_initialized() else code)
