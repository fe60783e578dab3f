"""Command line of test clusters: up, down, status, shell."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from mixmae.base.errors import UsageError, run_cli
from tests.cluster import cluster as clusters
from tests.cluster.cluster import Cluster
from tests.cluster.network import LOGIN
from tests.cluster.programs import missing

NAME = "mine"


def main(argv: Sequence[str]) -> int:
    own, inside = list(argv), []
    if "--" in own:  # the rest is a command for a host, which argparse must not read
        own, inside = own[: own.index("--")], own[own.index("--") + 1 :]
    options = _parser().parse_args(own, argparse.Namespace(inside=inside))
    return int(options.command(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tests.cluster", description="Test clusters of several hosts with ssh and Slurm on this machine."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="bring a cluster up and wait until it works")
    up.add_argument("--hosts", type=int, default=2, help="number of hosts besides the login host (2)")
    up.add_argument("--slots", type=int, default=2, help="ranks per host (2)")
    up.set_defaults(command=_up)
    down = commands.add_parser("down", help="take a cluster down, also an incomplete one")
    down.set_defaults(command=_down)
    shell = commands.add_parser("shell", help="a shell on a host, or one command: shell HOST -- COMMAND")
    shell.add_argument("host", nargs="?", default=LOGIN, help="login (default), node1, node2, ...")
    shell.set_defaults(command=_shell)
    for command in (up, down, shell):
        command.add_argument("--name", default=NAME, help=f"the cluster's name ({NAME})")
    commands.add_parser("status", help="list all clusters").set_defaults(command=_status)
    return parser


def _up(options: argparse.Namespace) -> int:
    if problem := missing():
        raise UsageError(problem)
    print(_usage(clusters.bring_up(options.name, options.hosts, options.slots)))
    return 0


def _usage(cluster: Cluster) -> str:
    command = f"python -m tests.cluster %s --name {cluster.name}"
    exports = "\n".join(f"    export {name}={value}" for name, value in cluster.environment.items())
    return f"""\
{cluster.name} is up: {", ".join(f"{host.name} {host.address}" for host in (cluster.login, *cluster.hosts))}
  hostfile           {cluster.hostfile()}
  shared by hosts    {cluster.shared}
  private to a host  {cluster.local}
  logs               {cluster.folder / "log"}
  a shell            {command % "shell"} [HOST] [-- COMMAND]
  take it down       {command % "down"}
Environment of a shell:
{exports}"""


def _down(options: argparse.Namespace) -> int:
    clusters.take_down(options.name)
    return 0


def _shell(options: argparse.Namespace) -> int:
    cluster = clusters.find(options.name)
    try:
        host = cluster.host(options.host)
    except KeyError:
        known = ", ".join(host.name for host in (cluster.login, *cluster.hosts))
        raise UsageError(f"{options.host}: no such host; expected one of {known}") from None
    shell = options.inside or [os.environ.get("SHELL", "/bin/bash")]
    process = host.popen(shell, stdin=None, start_new_session=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which shares the terminal
    code = process.wait()
    return code if code >= 0 else 128 - code


def _status(_: argparse.Namespace) -> int:
    for name in clusters.names():
        try:
            cluster = clusters.find(name)
        except UsageError:
            print(f"{name}: incomplete; python -m tests.cluster down --name {name}")
            continue
        print(f"{name}: {cluster.folder}")
        for host in cluster.hosts:
            print(f"  {host.name} {host.address} {cluster.slurm.node_state(host)} {len(host.processes())} processes")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
