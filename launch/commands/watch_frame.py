"""One run as a picture in a terminal: progress, loss, figures, ranks, events and alerts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mixmae.launch.commands.watch_runs import STYLES
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
from mixmae.monitoring.watch.view import View

CHART_ROWS, RANKS, EVENTS = 3, 10, 5
"""Lines of the chart, and most rows of a table."""
_OTHER_LINES = 17
"""What a frame has beside ranks, events, alerts and notes."""
_NARROW = 100
"""Columns below which the table of ranks is abridged."""
_WIDE = 120
"""Columns from which it says where late ranks are."""
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
