"""`mixmae monitor up RUN_DIR`: Prometheus and Alertmanager on this machine, with our rules, alerts and page of runs."""

import argparse
import shlex
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.base.ports import PortError, free_port_from
from mixmae.launch.commands.watch import add_access_options
from mixmae.monitoring.exporter.access import Access, AccessError
from mixmae.monitoring.prometheus.configuration import Runs
from mixmae.monitoring.prometheus.local import Monitor, MonitorError, Programs, find_programs
from mixmae.monitoring.watch.text import sanitize

_EVERY = 2.0
"""Seconds between two scans for new runs."""
_FILES = """Runs below a folder are found as they begin. Runs are told apart by the paths of their directories. A
password goes only to exporters that prove to have the certificate: what a run directory says is not trusted.

The servers listen on the loopback interface; from elsewhere: ssh -L 9090:127.0.0.1:9090 HOST."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae monitor", description=__doc__)
    up = parser.add_subparsers(required=True, metavar="up").add_parser(
        "up", help="run both servers until Ctrl-C", epilog=_FILES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    up.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR", help="run directory, or a directory of them")
    up.add_argument("--port", type=int, default=9090, help="of Prometheus; the next free one if it is taken")
    up.add_argument("--alertmanager-port", type=int, default=9093, metavar="PORT")
    up.add_argument("--data", type=Path, help="folder for what they store; default: a temporary one")
    up.add_argument("--dry-run", action="store_true", help="print commands and configuration instead of running them")
    add_access_options(up)
    args = parser.parse_args(argv)
    if args.auth_file is not None and args.certfile is None:
        raise UsageError(
            f"--auth-file {args.auth_file} would go to whatever address a run directory names; give the exporters' "
            "certificate with --certfile too"
        )
    access = Access(args.certfile, args.auth_file)
    for folder in args.folders:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file; expected a run directory, or a directory of run directories")
    try:
        access.check()
        with ExitStack() as stack:
            data = args.data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mixmae-monitor-")))
            monitor = prepare(find_programs(), args.folders, data, args.port, args.alertmanager_port, access)
            if args.dry_run:
                print(*map(shlex.join, monitor.commands.values()), f"\n{monitor.configuration}", sep="\n", end="")
                return 0
            signal.signal(signal.SIGTERM, _interrupt)
            stack.enter_context(monitor)
            print(addresses(monitor), flush=True)
            watch(monitor)
    except (MonitorError, PortError, AccessError) as error:
        raise UsageError(str(error)) from error
    except KeyboardInterrupt:
        print("ended", flush=True)
    return 0


def prepare(
    programs: Programs, folders: Sequence[Path], data: Path, port: int, alertmanager_port: int, access: Access
) -> Monitor:
    """The servers on free ports; says where they differ from what was asked for."""
    if programs.alertmanager is None:
        print("Alertmanager is not on PATH: alerts are shown by Prometheus alone "
              "('apt-get install prometheus-alertmanager' gets it)")  # fmt: skip
    found = _port("Prometheus", port)
    return Monitor(programs, folders, data, found, _port("Alertmanager", alertmanager_port, (found,)), access=access)


def addresses(monitor: Monitor) -> str:
    """What to open in a browser."""
    rows = [
        f"Prometheus    {monitor.url}/graph",
        f"runs          {monitor.url}/consoles/mixmae.html",
        f"alerts        {monitor.url}/alerts",
    ]
    if monitor.alertmanager_url is not None:
        rows.append(f"Alertmanager  {monitor.alertmanager_url}")
    return "\n".join([*rows, f"stored in     {monitor.data}", "Ctrl-C ends all of it."])


def watch(monitor: Monitor) -> None:
    """Follows the runs until it is interrupted.

    Raises:
        MonitorError: a server ended, or there is no room for its files.
    """
    known, told = None, set[str]()
    while True:
        monitor.check()
        try:
            monitor.update()
        except OSError as error:
            raise MonitorError(f"{monitor.data} cannot be written to: {error.strerror}") from error
        if (found := _describe(monitor.runs, monitor.folders)) != known:
            print(found, flush=True)
            known = found
        for note in monitor.notes:
            if note not in told:
                print(f"mixmae: warning: {sanitize(note)}", flush=True)
        told = set(monitor.notes)
        time.sleep(_EVERY)


def _describe(runs: Runs, folders: Sequence[Path]) -> str:
    if not runs:
        return f"waiting for a run to begin in {', '.join(map(str, folders))}"
    last_names = [run.name for run in runs]
    shown = {run: run.name if last_names.count(run.name) == 1 else str(run) for run in runs}
    return "watching " + ", ".join(
        f"{sanitize(shown[run])} ({len(targets)} node{'s'[: len(targets) > 1]})" for run, targets in runs.items()
    )


def _port(server: str, wanted: int, taken: Sequence[int] = ()) -> int:
    if not 0 < wanted < 2**16:
        raise UsageError(f"port {wanted} for {server}: expected 1 to 65535")
    found = free_port_from(wanted, taken)
    if found != wanted:
        print(f"port {wanted} is taken: {server} gets {found}")
    return found


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
