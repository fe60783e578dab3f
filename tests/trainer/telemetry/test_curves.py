"""The curves of a run show what it logged and what its task measured."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import RECIPE
from mixmae.trainer.telemetry.curves import draw, main
from mixmae.trainer.telemetry.events import Events
from tests.helpers import tiny_recipe


def test_a_run_directory_of_somebody_else_is_drawn_or_refused(tmp_path: Path) -> None:
    """Its recipe is not followed: a plugin that it names would be imported."""
    (tmp_path / RECIPE).write_text("plugins: [no_such_module]\n")
    with pytest.raises(UsageError, match="is not a run directory"):
        draw([tmp_path], tmp_path / "curves.png")
    events = Events(tmp_path)
    for step, loss in ((1, "x"), ([1], 1.0), (2, 10**400), (3, 0.5), ({}, None)):
        events.write("step", step=step, loss=loss, lr=1e-3)
    for metrics in ("x", {"$x$ \\frac": 1.0, "step": 7, "y": [1]}):
        events.write("evaluation", step=3, metrics=metrics)
    events.close()
    draw([tmp_path], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size


def test_every_evaluated_metric_has_a_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / RECIPE).write_text(tiny_recipe().to_yaml())
    events = Events(tmp_path)
    for step in range(1, 7):
        events.write("step", step=step, loss=1 / step if step > 1 else float("nan"), lr=1e-3, grad_norm=1.0)
        if step % 2 == 0:
            metrics = {"top1": step / 10, "top1/cat": 0.5} | ({"top5": step / 8} if step > 2 else {})
            events.write("evaluation", step=step, samples=8 * step, metrics=metrics)
    events.close()
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    draw([tmp_path], tmp_path / "curves.png")
    drawn: dict[str, Any] = {axes.get_ylabel(): axes.lines[0] for axes in figures[0].axes}
    assert list(drawn) == ["loss", "learning rate", "gradient norm", "eval/top1", "eval/top5"]
    assert list(drawn["eval/top1"].get_xdata()) == [2, 4, 6]
    top1: list[Any] = next(list(axes.lines) for axes in figures[0].axes if axes.get_ylabel() == "eval/top1")
    whole, of_class = top1
    assert list(of_class.get_ydata()) == [0.5] * 3
    assert (of_class.get_alpha(), of_class.get_zorder()) < (whole.get_alpha(), whole.get_zorder())
    assert list(drawn["eval/top5"].get_ydata()) == [0.5, 0.75]
    assert list(drawn["loss"].get_xdata()) == [1, 2, 3, 4, 5, 6]


def test_runs_of_a_folder_are_drawn_over_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("a", "more/b")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / RECIPE).write_text(tiny_recipe().to_yaml())
        events = Events(folder)
        events.write("step", step=1 + number, loss=0.5, lr=1e-3, grad_norm=1.0)
        if number:
            events.write("evaluation", step=2, samples=16, metrics={"top1": 0.5})
        events.close()
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    assert main([str(tmp_path), str(tmp_path / "a"), str(tmp_path / "curves.png")]) == 0
    loss, *_, top1 = figures[0].axes
    drawn: list[Any] = [*loss.lines, *top1.lines]
    assert [line.get_label() for line in drawn] == ["a", "more/b"] * 2
    assert [list(line.get_xdata()) for line in drawn] == [[1], [2], [], [2]]
    with pytest.raises(UsageError, match="is a directory; name the picture to write last"):
        main([str(tmp_path / "a"), str(tmp_path)])
