"""`python -m mixmae.launch.supervision.rank OPTIONS MODULE ARGUMENT ...`: runs a module as one supervised rank.

`mixmae launch` starts it once per rank, by DeepSpeed's launcher or srun. The rank and its peers come from the
environment, as for `mixmae.trainer.train` itself.
"""

import argparse
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from mixmae.base.errors import UsageError, run_cli
from mixmae.base.rank_env import read_rank_env
from mixmae.launch.supervision.membership import Limits
from mixmae.launch.supervision.orphans import Guard
from mixmae.launch.supervision.supervisor import RankSpec, supervise
from mixmae.launch.supervision.token import TOKEN


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae.launch.supervision.rank", description=__doc__, allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempt", required=True, help="name of this start of the run")
    parser.add_argument("--ranks", type=int, required=True, help="world size; any other is refused")
    parser.add_argument("--port", type=int, required=True, help="first of those that rank 0's supervisor may listen on")
    parser.add_argument("--launcher", action="store_true", help="wait for the launching process, and end with it")
    for name in ("join", "stuck", "grace"):
        parser.add_argument(f"--{name}-seconds", type=float, required=True)
    parser.add_argument("--environment", type=Path, metavar="FILE", help="more variables, as a JSON object")
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    if args.environment is not None:
        os.environ.update(_read_environment(args.environment))
    rank_env = read_rank_env(os.environ)
    if rank_env.world_size != args.ranks:
        raise UsageError(f"expected world size {args.ranks}, got {rank_env.world_size}; refusing to start")
    if not os.environ.get(TOKEN):
        raise UsageError(f"{TOKEN} is not set; start ranks with 'mixmae launch', or mixmae.trainer.train directly")
    spec = RankSpec(
        [sys.executable, "-m", args.module, *args.arguments],
        args.run_dir,
        args.attempt,
        args.port,
        args.launcher,
        Limits(args.join_seconds, args.stuck_seconds, args.grace_seconds),
        args.environment,
    )
    return supervise(spec, rank_env, os.environ[TOKEN], Guard())


def _read_environment(file: Path) -> dict[str, str]:
    try:
        return {str(name): str(value) for name, value in json.loads(file.read_text()).items()}
    except OSError as error:
        raise UsageError(
            f"{file} cannot be read on {socket.gethostname()} ({error.strerror}); 'mixmae launch' writes it there by "
            "ssh: check that its folder can be written to"
        ) from error


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
