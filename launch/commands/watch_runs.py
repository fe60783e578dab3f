"""Several runs as one table: a line for each, with its state, progress, speed and loss."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mixmae.base.run_directory import runs_below
from mixmae.monitoring.watch.history import State, number
from mixmae.monitoring.watch.text import amount, duration, sanitize
from mixmae.monitoring.watch.view import View, Watched, WatchError

STYLES = {
    State.NOT_STARTED: "bold yellow",
    State.RUNNING: "bold green",
    State.STALLED: "bold white on red",
    State.FINISHED: "bold blue",
    State.FAILED: "bold white on red",
    State.PREEMPTED: "bold yellow",
}
_ROOMY, _GAP = 100, 2
"""Columns from which the table also has the rate and the checkpoint of each run; and between two of its columns."""


class WatchedRuns:
    """Run directories, folders of them and endpoints; runs that begin later in a folder are found as well."""

    def __init__(self, given: Sequence[str], open_run: Callable[[str], Watched]) -> None:
        """Begins to watch.

        Args:
            open_run: makes a run directory or an endpoint something to look at.

        Raises:
            WatchError: what was given is neither, nor a folder with run directories below it.
        """
        self._given, self._open = given, open_run
        self._runs: dict[str, Watched] = {}
        for what in given:
            self._find(what)
            if not _named(what) and what not in self._runs:
                self._runs[what] = open_run(what)  # which says what is wrong

    def _find(self, what: str) -> None:
        for name in _named(what):
            if name not in self._runs:
                self._runs[name] = self._open(name)

    def wait_until_polled(self) -> None:
        for run in self._runs.values():
            run.wait_until_polled()

    def views(self, now: float) -> list[View]:
        for what in self._given:
            self._find(what)
        return [run.view(now) for run in self._runs.values()]


def _named(what: str) -> list[str]:
    """Endpoints and runs that an argument stands for."""
    if "://" in what:
        return [what]
    try:
        return [str(run) for run in runs_below(Path(what))]
    except OSError as error:
        raise WatchError(f"{what} cannot be read: {error.strerror}") from error


def table_of(views: Sequence[View], width: int, height: int | None = None) -> RenderableType:
    """A line for each run, as many as fit; those that need a look first."""
    ordered = sorted(views, key=lambda view: view.state not in (State.STALLED, State.FAILED))
    shown = ordered if height is None else ordered[: max(1, height - 3)]
    roomy = width >= _ROOMY
    names = ("run", "state", "step", "%", "left", "loss", *(("img/s", "checkpoint") if roomy else ()), "ranks")
    rows = [list(_cells(view, roomy)) for view in shown]
    others = [max(map(len, column)) + _GAP for column in zip(names[1:], *(row[1:] for row in rows), strict=True)]
    table = Table(box=None, padding=(0, _GAP, 0, 0), header_style="dim", pad_edge=False)
    for name in names:
        left = max(_GAP, width - sum(others)) if name == "run" else None
        table.add_column(
            name,
            justify="left" if name in ("run", "state", "ranks") else "right",
            no_wrap=True,
            overflow="ellipsis",
            max_width=left,
        )
    for row in rows:
        table.add_row(*row)
    parts: list[RenderableType] = [table]
    if hidden := len(ordered) - len(shown):
        parts.append(Text(f"and {hidden} more", "dim"))
    return Group(*parts)


def _cells(view: View, roomy: bool) -> Iterator[Text]:
    total, saved = view.log.total_steps, view.log.checkpoint
    yield Text(sanitize(view.name))
    yield Text(f" {view.state} ", STYLES[view.state])
    yield Text(f"{view.step:,}")
    yield Text(f"{100 * min(1.0, view.step / total):.0f}" if total else "-")
    yield Text("-" if view.remaining != view.remaining else duration(view.remaining))
    yield Text(f"{view.log.losses[-1]:.4g}" if view.log.losses else "-")
    if roomy:
        yield Text(amount(number(view.log.last, "images_per_second")))
        yield Text("-" if saved is None else f"{duration(view.now - saved['time'])} ago")
    troubled = sum(bool(rank.trouble) for rank in view.ranks)
    yield Text(f"{troubled} late", "bold red") if troubled else Text("")
