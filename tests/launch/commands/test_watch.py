import io
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from mixmae.launch.commands.watch import CHART_ROWS, RANKS, describe, frame, main
from mixmae.launch.commands.watch_runs import table_of
from mixmae.monitoring.watch.history import Log
from mixmae.monitoring.watch.scrape import Alert, Rank
from mixmae.monitoring.watch.view import View
from tests.helpers import ROOT

NOW = 1_700_000_000.0
COMMAND = [
    sys.executable,
    "-c",
    "import sys; from mixmae.launch.commands.watch import main; from mixmae.base.errors import run_cli; "
    "sys.exit(run_cli(main, sys.argv[1:]))",
]


def events(steps: int = 200, total: int = 1000, until: float = NOW) -> list[dict[str, Any]]:
    """A run that logs every 5 steps, 10 seconds apart, until `until`."""
    since = until - 10 * steps / 5
    found: list[dict[str, Any]] = [
        {"event": "start", "time": since, "step": 0, "world_size": 64, "total_steps": total, "parameters": 10}
    ]
    for step in range(5, steps + 1, 5):
        values = {"loss": 0.4 + 1 / step, "lr": 1.5e-4, "grad_norm": 0.3, "epoch": step / 100, "skipped_steps": 1}
        more = {"images_per_second": 2400.0, "replaced_samples": 7, "peak_memory_bytes": 2**36}
        found.append({"event": "step", "time": since + 2 * step, "step": step, **values, **more})
        if step % 50 == 0:
            folder = f"runs/a/checkpoints/step-{step:08d}"
            found.append({"event": "checkpoint", "time": since + 2 * step, "step": step, "folder": folder})
    return found


def log_of(records: list[dict[str, Any]]) -> Log:
    log = Log()
    for record in records:
        log.add(record)
    return log


def many_ranks(count: int) -> list[Rank]:
    ranks = [Rank(n, f"node{n // 8:03d}", 201, 0.4, 38.0, 0.03, 6e10, 8.5e10, n % 3, "") for n in range(count)]
    if count > 3:
        ranks[3] = replace(ranks[3], age=754.0, step=180, trouble="late", phase="data_wait")
    return sorted(ranks, key=lambda rank: rank.sort_key)


def text_of(view: View, width: int, height: int | None = None, ascii_only: bool = False) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(frame(view, width, height, ascii_only))
    return out.getvalue()


FULL = View(
    "swin_base",
    "mixmae_swin_base_w14, 64 ranks, 1,024 images a step",
    log_of(events()),
    NOW + 1,
    many_ranks(64),
    ["2 of 8 exporters do not respond: node006, node007 (Connection refused)"],
    [Alert("MixmaeStalled", "critical", NOW - 700, "rank 3 has not finished a step for 12 minutes")],
)


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


# the command


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "nano"
    folder.mkdir()
    lines = [json.dumps(record) for record in events(until=time.time())]
    (folder / "events.jsonl").write_text("\n".join(lines) + '\n{"event": "st')
    (folder / "recipe.yaml").write_text("encoder: {name: nano}\ntrain: {global_batch: 64}\n")
    return folder


def call(*argv: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    words = [*COMMAND, *map(str, argv)]
    return subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=False, env={**plain, **environment}, timeout=200
    )


def on_terminal(*argv: object, columns: int = 100, interrupt_after: str = "", **environment: str) -> tuple[int, str]:
    """Runs the command in a pseudo-terminal; SIGINT once a text was shown. Its exit code and all it wrote."""
    import fcntl
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
    shown = {**plain, "TERM": "xterm-256color", **environment}
    process = subprocess.Popen(
        [*COMMAND, *map(str, argv)], cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, env=shown, close_fds=True
    )
    os.close(slave)
    out, signalled = b"", False
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux' way to say that the other end is closed
            break
        out += part
        if interrupt_after and not signalled and out.count(interrupt_after.encode()) >= 2:
            process.send_signal(signal.SIGINT)
            signalled = True
        if not part:
            break
    os.close(master)
    return process.wait(200), out.decode()


def test_once_in_a_pipe(run_dir: Path) -> None:
    done = call(run_dir, "--once", COLUMNS="90")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "nano   running   nano, 64 ranks, 64 images a step" in done.stdout
    assert "step 200 of 1,000" in done.stdout
    assert "ranks are not shown: no exporter is announced" in done.stdout
    assert call(run_dir, "--once", PYTHONIOENCODING="ascii").returncode == 0


def test_runs_of_a_folder_are_a_table(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_dir.parent / "more" / "second"
    folder.mkdir(parents=True)
    assert main([str(run_dir.parent), "--once"]) == 0
    assert "step 200 of 1,000" in capsys.readouterr().out  # one run is shown in full
    failed = {"event": "failed", "time": time.time(), "step": 200}
    lines = [json.dumps(record) for record in [*events(until=time.time()), failed]]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    assert main([str(run_dir.parent), str(folder), "--once"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["run", "state", "step", "%"]
    assert [row.split()[:4] for row in rows] == [["second", "failed", "200", "20"], ["nano", "running", "200", "20"]]


@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_table_of_runs_fits_its_terminal(width: int) -> None:
    views = [replace(FULL, name=f"run-{number}-{'x' * 70}") for number in range(30)]
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table_of(views, width, height=24))
    lines = out.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    assert len(lines) < 24
    assert lines[-1] == "and 9 more"
    assert all("late" in line for line in lines[1:-1])


def test_on_a_terminal_with_and_without_colour(run_dir: Path) -> None:
    code, text = on_terminal(run_dir, "--once", columns=110)
    assert code == 0
    assert "\x1b[1;32m" in text
    code, text = on_terminal(run_dir, "--once", NO_COLOR="1")
    assert code == 0
    assert not re.search(r"\x1b\[[\d;]*3\d", text)


def test_watching_goes_on_until_ctrl_c(run_dir: Path) -> None:
    code, text = on_terminal(run_dir, "--interval", "0.2", interrupt_after="step 200")
    assert code == 0
    assert "Traceback" not in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_watching_ends_with_the_run(run_dir: Path) -> None:
    with (run_dir / "events.jsonl").open("a") as stream:
        stream.write("\n" + json.dumps({"event": "end", "time": time.time(), "step": 1000}) + "\n")
    done = call(run_dir, "--interval", "0.1")
    assert done.returncode == 0
    assert done.stdout.count("finished") == 1
    assert "invalid lines in events.jsonl that are skipped: 1" in done.stdout


def test_a_closed_pipe_is_no_traceback(run_dir: Path) -> None:
    words = " ".join(f"'{word}'" for word in [*COMMAND, str(run_dir), "--interval", "0.1"])
    done = subprocess.run(f"{words} | head -1", shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["/nonexistent"], "/nonexistent is not a run directory: it has neither recipe.yaml nor events.jsonl"),
        (["http://127.0.0.1:1"], "http://127.0.0.1:1 is not a run's exporter: Connection refused"),
        (["ftp://a"], "is not a run's exporter: ftp://a/metrics is no http:// or https:// address"),
        (["/tmp", "--interval", "0"], "--interval 0: expected 0.1 seconds or more"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str) -> None:
    done = call(*argv)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_only_this_command_imports_rich() -> None:
    show = "import sys, mixmae.launch.cli, mixmae.monitoring.watch.view; print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
