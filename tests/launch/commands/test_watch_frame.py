import io
import math
import re
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from mixmae.launch.commands.watch_frame import CHART_ROWS, RANKS, describe, frame
from mixmae.monitoring.watch.history import Log
from mixmae.monitoring.watch.scrape import Rank
from mixmae.monitoring.watch.view import View
from tests.launch.commands.views import FULL, NOW, events, log_of


def text_of(view: View, width: int, height: int | None = None, ascii_only: bool = False) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(frame(view, width, height, ascii_only))
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 72, 80, 99, 100, 140, 200])
def test_frames_of_every_width(width: int) -> None:
    text = text_of(FULL, width)
    lines = text.splitlines()
    assert max(map(cell_len, lines)) <= width
    for part in (
        *("swin_base", " running ", "20.1 %", "step 201 of 1,000", "epoch 2.00 of 10", "elapsed 7 min", "ETA 27 min"),
        *("loss 0.405", "best 0.405 at step 200", "images/s 2,400", "learning rate 0.00015", "gradient norm 0.3"),
        *("skipped steps 1", "replaced samples 63", "peak memory 64.0 GiB", "checkpoint step 200, 1 s ago"),
        *("and 54 more", "ALERT MixmaeStalled (critical) for 12 min", "2 of 8 exporters do not respond"),
    ):
        assert part in text, part
    header = next(n for n, line in enumerate(lines) if line.startswith("rank"))
    rows = lines[header + 1 : header + 1 + RANKS]
    assert re.match(r"\s*3 .*13 min.*late" + (" in data_wait" if width >= 120 else "$"), rows[0].rstrip())
    assert "node" in rows[0]
    assert "late" not in "".join(rows[1:])
    assert "…" not in "".join(lines[header : header + 1 + RANKS])


def test_long_names_of_nodes_give_way_to_numbers() -> None:
    far = replace(FULL.ranks[0], node="n" * 80, step=375_300, age=4800.0, trouble="silent")
    for width in (60, 99, 100, 120):
        row = next(
            line
            for line in text_of(replace(FULL, ranks=[far]), width).splitlines()
            if "GiB" in line and "silent" in line
        )
        assert re.search(r" 3 +n*….* 375,300 +1 h 20 min .*3 % .*55.9 GiB.* silent", row)


def test_a_frame_fits_its_terminal() -> None:
    for height in (24, 30, 50):
        lines = text_of(FULL, 100, height).splitlines()
        assert len(lines) <= max(height, 24), height
    assert "and 54 more" in text_of(FULL, 100, 50)
    assert "and 6" in text_of(FULL, 100, 24)


def test_the_chart_spans_the_run_and_the_width() -> None:
    lines = text_of(FULL, 60).splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("loss"))
    drawn = lines[first + 1 : first + 1 + CHART_ROWS]
    assert drawn[0].startswith("█")
    assert len(drawn[-1].rstrip()) == 40  # logged steps; a longer run fills the width
    long = text_of(replace(FULL, log=log_of(events(5000, 9000))), 60).splitlines()
    assert len(long[first + CHART_ROWS]) == 60


def test_frames_of_runs_of_all_kinds() -> None:
    empty = text_of(View("new", "", Log(), NOW), 80)
    assert "not started" in empty
    assert "step 0, target unknown" in empty
    started = text_of(View("new", "", log_of(events(0)), NOW + 5), 80)
    assert "step 0 of 1,000" in started
    assert "0.0 %" in started
    assert "ETA" not in started
    records = events()
    one = text_of(View("one", "", log_of(records[:2]), NOW), 80)
    assert "loss 0.6" in one
    not_a_number = [{**record, "loss": None} for record in records]
    assert "loss nan" in text_of(View("bad", "", log_of(not_a_number), NOW), 80)
    end = {"event": "end", "time": NOW, "step": 1000}
    finished = text_of(View("done", "", log_of([*records, end]), NOW + 7200), 80)
    assert "finished 2 h 0 min ago" in finished
    assert "100.0 %" in finished
    assert "stalled for 12 min" in text_of(View("hung", "", log_of(records), NOW + 720), 80)
    failed = {"event": "failed", "time": NOW, "message": "rank 3:\nout of\x1b[2J memory"}
    assert "failed     rank 3: out of?[2J memory" in text_of(View("bad", "", log_of([*records, failed]), NOW + 9), 80)
    resumed = {"event": "resumed", "time": NOW, "step": 100}
    assert "resumed 1x" in text_of(View("again", "x", log_of([*records, resumed]), NOW + 9), 80)
    without_total = [{k: v for k, v in record.items() if k != "total_steps"} for record in records]
    unknown = text_of(View("old", "", log_of(without_total), NOW), 80)
    assert "step 200, target unknown   epoch 2.00   " in unknown
    assert "no alert fires" in text_of(replace(FULL, alerts=()), 80)


def test_unknown_numbers_are_dashes() -> None:
    rank = Rank(0, "a", None, None, math.nan, math.nan, math.nan, 0.0, 0, "")
    assert re.search(r"0\s+a\s+-\s+-\s+-\s+-\s+-\s+0", text_of(replace(FULL, ranks=[rank]), 100))


def test_ascii_where_the_terminal_knows_no_more() -> None:
    lines = text_of(FULL, 80, ascii_only=True).splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("loss"))
    assert "".join(lines[first : first + 1 + CHART_ROWS]).isascii()


def test_events_are_described() -> None:
    record = {"event": "checkpoint", "time": 1.0, "step": 1200, "folder": "a/b", "peak": 0.25}
    assert describe(record) == "step 1,200, folder a/b, peak 0.25"
    assert describe({**record, "message": "saved"}) == "saved"
