"""`mixmae bench monitoring`: overhead of metrics per step, with an exporter that is scraped.

Steps with and without metrics are interleaved, so that both see the same machine; medians are compared. The exporter,
its scraper and the heartbeat thread run during both kinds of steps, so the difference is that of the calls in a step.
The exporter's CPU share is reported separately.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from mixmae.base.run_directory import targets_folder
from mixmae.monitoring.exporter.discovery import run_label
from mixmae.monitoring.exporter.recorder import NullRecorder, Recorder
from mixmae.trainer.benchmarks.in_memory import InMemory
from mixmae.trainer.benchmarks.results import RESULTS, write_result
from mixmae.trainer.data.stream import Stream
from mixmae.trainer.engine.auto import fit_here
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run.state import TrainState
from mixmae.trainer.telemetry.observer import Observer

_SCRAPER = """
import json, sys, time, urllib.request
target = json.load(open(sys.argv[1]))[0]["targets"][0]
while True:
    urllib.request.urlopen(f"http://{target}/metrics").read()
    time.sleep(1)
"""
_PARTS = ("data_wait", "forward", "backward", "optimizer")
_LOGGED = {"loss": 1.0, "grad_norm": 1.0, "lr": 1e-4, "epoch": 1.0, "images_per_second": 1000.0}
_CALLS = 1000
"""Empty steps to average the duration of the calls over; one in `log.every` is logged."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae bench monitoring", description=__doc__)
    parser.add_argument("--step-ms", type=float, default=100.0, help="duration of a step (default %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="number of steps with metrics, and as many without")
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / "monitoring.json", help="write the figures")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="mixmae-bench-") as folder:
        result = measure(Path(folder), args.step_ms / 1000, args.steps)
    print(
        f"step without metrics {result['step_ms_without']:.2f} ms, with metrics {result['step_ms_with']:.2f} ms: "
        f"{result['ratio'] - 1:+.3%}; the calls alone take {result['calls_us']:.0f} microseconds, "
        f"{result['calls_share']:.3%} of a step; the exporter, scraped every second, uses "
        f"{result['exporter_cpu_share']:.2%} of a core"
    )
    if args.json is not None:
        write_result(args.json, result)
    return 0


def measure(folder: Path, seconds: float, steps: int) -> dict[str, Any]:
    """Step times with and without an observer, interleaved."""
    torch.set_num_threads(1)
    recipe = fit_here(Recipe.model_validate({"run_dir": str(folder / "run"), "monitoring": {"port": 0}}), Ranks())
    recipe.run_dir.mkdir()
    shared = folder / "shared"
    observed = Observer(Recorder(shared, 0), recipe, Ranks(), shared)
    silent = Observer(NullRecorder(), recipe, Ranks())
    observed.export(run_label(recipe.run_dir))
    assert observed.exporter is not None
    scraper = _scrape(recipe.run_dir)
    exporter = psutil.Process(observed.exporter.pid)
    work, batches = _work_of(seconds), InMemory()
    observed.begin(2 * steps, parameters=0)
    times: dict[bool, list[float]] = {False: [], True: []}
    try:
        started, busy = time.perf_counter(), _cpu_seconds(exporter)
        for number in range(1, steps + 1):
            for metrics in (False, True):
                times[metrics].append(_step(observed if metrics else silent, work, batches, TrainState(step=number)))
        share = (_cpu_seconds(exporter) - busy) / (time.perf_counter() - started)
        calls = statistics.mean(
            _step(observed, lambda: None, batches, TrainState(step=n)) for n in range(1, _CALLS + 1)
        )
    finally:
        scraper.kill()
        observed.close(clean=True)
    without, with_ = statistics.median(times[False]), statistics.median(times[True])
    return {
        "step_ms_without": round(without * 1000, 4),
        "step_ms_with": round(with_ * 1000, 4),
        "ratio": round(with_ / without, 5),
        "calls_us": round(calls * 1e6, 1),
        "calls_share": round(calls / without, 6),
        "exporter_cpu_share": round(share, 5),
        "steps": steps,
    }


def _step(observer: Observer, work: Callable[[], object], batches: Stream, state: TrainState) -> float:
    """Seconds of a step that works in its forward phase, with the loop's calls to the observer."""
    started = time.perf_counter()
    for part in _PARTS:
        with observer.clock.phase(part):
            if part == "forward":
                work()
    observer.data(batches)
    if state.step % observer.recipe.log.every == 0:
        with observer.clock.phase("logging"):
            observer.process()
            observer.logged(_LOGGED, state, state.step)
    observer.step(state, images=128)
    return time.perf_counter() - started


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _work_of(seconds: float) -> Callable[[], object]:
    """Matrix products that take about `seconds`."""
    x = torch.randn(256, 256)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 1.0:
        x @ x
        count += 1
    repeats = max(1, round(count * seconds))

    def work() -> None:
        for _ in range(repeats):
            x @ x

    return work


def _scrape(run_dir: Path) -> "subprocess.Popen[bytes]":
    """A process that scrapes the exporter every second, more often than Prometheus would."""
    while not (files := list(targets_folder(run_dir).glob("*.json"))):
        time.sleep(0.05)
    return subprocess.Popen([sys.executable, "-c", _SCRAPER, str(files[0])], env=os.environ)
