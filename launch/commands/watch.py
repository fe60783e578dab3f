"""`mixmae watch RUN ...`: progress, rates, loss, ranks and alerts of a run in a terminal, over ssh too.

Several runs, or a folder of runs, are a table with a line for each.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mixmae.base.errors import UsageError
from mixmae.launch.commands.watch_runs import STYLES, WatchedRuns, table_of
from mixmae.monitoring.exporter.access import PLAIN, Access, AccessError
from mixmae.monitoring.watch.history import State, number
from mixmae.monitoring.watch.scrape import Rank
from mixmae.monitoring.watch.text import (
    ASCII_BLOCKS,
    BLOCKS,
    amount,
    chart,
    clock,
    duration,
    sanitize,
    size,
    wrap_items,
)
from mixmae.monitoring.watch.view import View, Watched, WatchedEndpoint, WatchedRun, WatchError

CHART_ROWS, RANKS, EVENTS = 3, 10, 5
"""Lines of the chart, and most rows of a table."""
_OTHER_LINES = 17
"""What a frame has beside ranks, events, alerts and notes."""
_NARROW = 100
"""Columns below which the table of ranks is abridged."""
_WIDE = 120
"""Columns from which it says where late ranks are."""
Frame = tuple[RenderableType, bool]
"""A picture, and whether all that it shows has finished."""
_RANK_COLUMNS = {
    "rank": "rank",
    "node": "node",
    "step": "step",
    "beat": "beat",
    "images/s": "img/s",
    "data wait": "wait",
    "memory": "memory",
    "replaced": "repl",
    "": "",
}


def frame(view: View, width: int, height: int | None = None, ascii_only: bool = False) -> RenderableType:
    """One picture of a run; as high as it needs to be, or not higher than `height` lines."""
    alerts = [*_alerts(view)]
    notes = [_line(sanitize(note), "yellow") for note in view.notes]
    room = RANKS + EVENTS if height is None else max(4, height - _OTHER_LINES - len(alerts) - len(notes))
    news = min(EVENTS, max(1, room // 3), len(view.log.news))
    parts: list[RenderableType] = [_title(view), *_progress(view, width)]
    if view.log.losses:
        parts += [Text(), _loss(view), *_chart(view, width, ascii_only)]
    parts += [Text(), _numbers(view, width), _checkpoint(view)]
    if view.ranks:
        parts += [Text(), *_ranks(view.ranks, min(RANKS, max(1, room - news)), width)]
    if news or alerts or notes:
        parts += [Text(), *_events(view, news), *alerts, *notes]
    return Group(*parts)


def _title(view: View) -> Text:
    state, log = view.state, view.log
    words = str(state)
    if state is State.STALLED:
        words += f" for {duration(view.silence)}"
    elif log.ended is not None and log.latest is not None:
        words += f" {duration(view.now - log.latest)} ago"
    title = Text.assemble((sanitize(view.name), "bold"), "  ", (f" {words} ", STYLES[state]), "  ", no_wrap=True)
    resumed = f", resumed {log.resumes}x" if log.resumes else ""
    title.append(sanitize(view.details) + resumed, "dim")
    title.overflow = "ellipsis"
    return title


def _progress(view: View, width: int) -> Iterator[RenderableType]:
    total, step, epoch = view.log.total_steps, view.step, number(view.log.last, "epoch")
    if total:
        share = min(1.0, step / total)
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        done = ProgressBar(total, step, width - 9, complete_style="green", finished_style="blue")
        bar.add_row(done, f"{100 * share:.1f} %")
        yield bar
    facts = [f"step {step:,}" + (f" of {total:,}" if total else ", target unknown")]
    if math.isfinite(epoch):
        logged = view.log.last["step"]
        facts.append(f"epoch {epoch:.2f}" + (f" of {epoch * total / logged:.4g}" if total and logged else ""))
    if math.isfinite(view.elapsed):
        facts.append(f"elapsed {duration(view.elapsed)}")
    if math.isfinite(view.remaining):
        facts.append(f"ETA {duration(view.remaining)} ({clock(view.now + view.remaining, view.now)})")
    yield from (Text(line, "bold") for line in wrap_items(facts, width))


def _loss(view: View) -> Text:
    line, best = Text.assemble(("loss ", "dim"), (f"{view.log.losses[-1]:.4g}", "bold")), view.log.best
    if best is not None:
        line.append("   best ", "dim").append(f"{best[0]:.4g}").append(f" at step {best[1]:,}", "dim")
    return line


def _chart(view: View, width: int, ascii_only: bool) -> Iterator[Text]:
    for row in chart(view.log.losses, width, CHART_ROWS, ASCII_BLOCKS if ascii_only else BLOCKS):
        yield Text(row, "cyan", no_wrap=True)


def _numbers(view: View, width: int) -> Table:
    """Name and value side by side, in as many columns as fit."""
    columns = min(4, max(1, width // 28))
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in range(columns):
        table.add_column(ratio=1, no_wrap=True)
    cells = [Text.assemble((f"{name} ", "dim"), (value, style)) for name, value, style in _facts(view)]
    for first in range(0, len(cells), columns):
        table.add_row(*cells[first : first + columns])
    return table


def _facts(view: View) -> Iterator[tuple[str, str, str]]:
    log, last = view.log, view.log.last
    yield "images/s", amount(number(last, "images_per_second")), "bold"
    yield "mean images/s", amount(log.mean_rate), ""
    yield "learning rate", amount(number(last, "lr")), ""
    yield "gradient norm", amount(number(last, "grad_norm")), ""
    yield "skipped steps", f"{log.skipped:,}", "bold red" if log.skipped else ""
    replaced = max(int(last.get("replaced_samples", 0)), sum(rank.replaced for rank in view.ranks))
    yield "replaced samples", f"{replaced:,}", "yellow" if replaced else ""
    yield "peak memory", size(number(last, "peak_memory_bytes")), ""
    retried = int(last.get("retried_reads", 0))
    yield "retried reads", f"{retried:,}", ""


def _checkpoint(view: View) -> Text:
    saved = view.log.checkpoint
    if saved is None:
        return Text("no checkpoint yet", "dim")
    step = f"step {saved['step']:,}, " if "step" in saved else ""
    return Text.assemble(("checkpoint ", "dim"), f"{step}{duration(view.now - saved['time'])} ago")


def _ranks(ranks: Sequence[Rank], rows: int, width: int) -> Iterator[RenderableType]:
    shown = ranks if len(ranks) <= rows + 1 else ranks[:rows]  # "and 1 more" would take the same line
    narrow = width < _NARROW
    names = list(_RANK_COLUMNS.values() if narrow else _RANK_COLUMNS)
    cells = [_rank_cells(rank, narrow, width >= _WIDE) for rank in shown]
    gap = 1 if narrow else 3
    taken = [max(map(len, column)) + gap for column in zip(names, *cells, strict=True)]
    table = Table(box=None, padding=(0, gap, 0, 0), header_style="dim", pad_edge=False)
    for name in names:
        left = max(1, width - sum(taken) + taken[names.index("node")] - gap) if name == "node" else None
        table.add_column(
            name,
            justify="left" if name in ("node", "") else "right",
            no_wrap=True,
            overflow="ellipsis",
            max_width=left,
        )
    for rank, row in zip(shown, cells, strict=True):
        table.add_row(*row, style="bold red" if rank.trouble else "")
    yield table
    if hidden := ranks[len(shown) :]:
        troubled = sum(bool(rank.trouble) for rank in hidden)
        yield Text(f"and {len(hidden)} more" + (f", {troubled} of them late or silent" if troubled else ""), "dim")


def _rank_cells(rank: Rank, narrow: bool, wide: bool) -> list[str]:
    where = f" in {rank.phase}" if rank.trouble in ("late", "stopped") and rank.phase and wide else ""
    full = f" {100 * rank.memory / rank.memory_limit:3.0f} %" if rank.memory_limit and not narrow else ""
    return [
        str(rank.rank),
        sanitize(rank.node),
        "-" if rank.step is None else f"{rank.step:,}",
        "-" if rank.age is None else duration(rank.age),
        amount(rank.images_per_second),
        "-" if math.isnan(rank.data_wait) else f"{100 * rank.data_wait:.0f} %",
        size(rank.memory) + full,
        f"{rank.replaced:,}",
        rank.trouble + where,
    ]


def _events(view: View, count: int) -> Iterator[Text]:
    styles = {"skipped": "yellow", "failed": "bold red"}
    for event in list(view.log.news)[len(view.log.news) - count :]:
        kind = sanitize(event["event"])
        yield _line(f"{clock(event['time'], view.now):>9}  {kind:<10} {describe(event)}", styles.get(kind, ""))


def _alerts(view: View) -> Iterator[Text]:
    if view.alerts == ():
        yield _line("no alert fires", "green")
    for alert in (view.alerts or ())[:EVENTS]:
        style = "bold red" if alert.severity == "critical" else "bold yellow"
        since = duration(view.now - alert.since)
        yield _line(
            f"ALERT {sanitize(alert.name)} ({sanitize(alert.severity)}) for {since}: {sanitize(alert.text)}", style
        )
    if (more := len(view.alerts or ()) - EVENTS) > 0:
        yield _line(f"and {more} more alerts", "bold yellow")


def _line(text: str, style: str) -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def describe(event: Mapping[str, Any]) -> str:
    """An event's fields in words."""
    fields = [(k, v) for k, v in event.items() if k not in ("event", "time", "message", "run", "target_steps")]
    words = [
        f"{name.replace('_', ' ')} {amount(number(event, name)) if isinstance(value, int | float) else value}"
        for name, value in fields
    ]
    return sanitize(str(event.get("message") or ", ".join(words)))


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
