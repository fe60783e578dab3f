"""`mixmae watch RUN ...`: progress, rates, loss, ranks and alerts of a run in a terminal, over ssh too.

Several runs, or a folder of runs, are a table with a line for each.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live

from mixmae.base.errors import UsageError
from mixmae.launch.commands.watch_frame import frame
from mixmae.launch.commands.watch_runs import WatchedRuns, table_of
from mixmae.monitoring.exporter.access import PLAIN, Access, AccessError
from mixmae.monitoring.watch.history import State
from mixmae.monitoring.watch.view import View, Watched, WatchedEndpoint, WatchedRun, WatchError

Frame = tuple[RenderableType, bool]
"""A picture, and whether all that it shows has finished."""


def open_run(what: str, interval: float, prometheus: str | None, access: Access = PLAIN) -> Watched:
    """What an address or a directory stands for.

    Args:
        access: the reader's certificate and password for exporters.

    Raises:
        WatchError: no exporter of a run answers there, or it is not a run directory.
    """
    if "://" in what:
        return WatchedEndpoint(what, interval, prometheus, access)
    if access.auth_file is not None and access.certfile is None:
        raise WatchError(
            f"--auth-file {access.auth_file} would go to whatever address {what} names; give the exporters' "
            "certificate with --certfile too, or name the exporter: http://NODE:PORT"
        )
    return WatchedRun(Path(what), interval, prometheus, access)


def follow(look: Callable[[], Frame], console: Console, interval: float) -> None:
    """Draws a frame every `interval` seconds until the run has finished: in place on a terminal, else one by one."""
    in_place = console.is_terminal and not console.is_dumb_terminal
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") if in_place else nullcontext() as live:
        while True:
            drawn, finished = look()
            if live is None:
                console.print(drawn)
            else:
                live.update(drawn, refresh=True)
            if finished:
                return
            time.sleep(interval)


def add_access_options(parser: argparse.ArgumentParser) -> None:
    """Adds the reader's own files; those that a run's recipe names are not the reader's to send anywhere."""
    parser.add_argument("--certfile", type=Path, metavar="FILE", help="certificate of exporters that speak TLS (PEM)")
    parser.add_argument("--auth-file", type=Path, metavar="FILE", help="one line user:password, for exporters that ask "
                        "for it; needs --certfile where a run directory names them")  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae watch", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directory, folder of them, or http://NODE:PORT of a node's exporter"
    )
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="between two frames (default 2)")
    parser.add_argument(
        "--prometheus", metavar="URL", help="also show this run's firing alerts, as this server has them"
    )
    add_access_options(parser)
    args = parser.parse_intermixed_args(argv)
    if not 0.1 <= args.interval < math.inf:
        raise UsageError(f"--interval {args.interval:g}: expected 0.1 seconds or more")
    console = Console(highlight=False)
    in_place = console.is_terminal and not console.is_dumb_terminal and not args.once
    try:
        access = Access(args.certfile, args.auth_file)
        access.check()
        runs = WatchedRuns(args.runs, lambda what: open_run(what, args.interval, args.prometheus, access))

        def look() -> Frame:
            return picture(runs.views(time.time()), console, console.height if in_place else None)

        if args.once:
            runs.wait_until_polled()
            console.print(look()[0])
        else:
            follow(look, console, args.interval)
    except (WatchError, AccessError) as error:
        raise UsageError(str(error)) from error
    except KeyboardInterrupt:
        return 0
    return 0


def picture(views: Sequence[View], console: Console, height: int | None) -> Frame:
    """One run in full, several as a table."""
    finished = all(view.state is State.FINISHED for view in views)
    if len(views) == 1:
        return frame(views[0], console.width, height, console.options.ascii_only), finished
    return table_of(views, console.width, height), finished
