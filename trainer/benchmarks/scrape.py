"""`mixmae bench scrape`: time to scrape all exporters of a large run, each a process with ranks that set all metrics.

They share this machine's cores; on a cluster each node has its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixmae.base.phases import STEP_PHASES
from mixmae.base.run_directory import targets_folder
from mixmae.monitoring.exporter.recorder import Recorder
from mixmae.monitoring.metrics import METRICS, STEP_BUCKETS, Kind, Metric, Source
from mixmae.monitoring.metrics_page import VALUES, most_series
from mixmae.trainer.benchmarks.results import RESULTS, write_result

_ROUNDS = 5


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae bench scrape", description=__doc__)
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=8, help="ranks per node")
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / "scrape.json", help="write the figures")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="mixmae-bench-") as folder:
        result = measure(Path(folder), args.nodes, args.ranks)
    print(
        f"{result['nodes']} exporters of {result['ranks']} ranks each are scraped in {result['seconds']:.2f} s: "
        f"{result['series']:,} series, at most {result['most_series']:,}"
    )
    if args.json is not None:
        write_result(args.json, result)
    return 0


def measure(folder: Path, nodes: int, ranks: int) -> dict[str, Any]:
    """Median seconds to scrape all exporters concurrently."""
    with exporters(folder, nodes, ranks) as urls, ThreadPoolExecutor(nodes) as pool:
        rounds = []
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            answers = [*pool.map(_fetch, urls)]
            rounds.append(time.perf_counter() - started)
    return {
        "nodes": nodes,
        "ranks": ranks,
        "seconds": round(statistics.median(rounds), 3),
        "series": sum(answer.count(b"\nmixmae_") for answer in answers),
        "most_series": most_series(nodes, ranks),
        "bytes": sum(map(len, answers)),
    }


@contextmanager
def exporters(folder: Path, nodes: int, ranks: int) -> Iterator[list[str]]:
    """Starts the exporters of a run whose main rank is on the first node; yields their URLs."""
    processes = []
    try:
        for node in range(nodes):
            shared, run_dir = folder / f"shared-{node}", folder / f"run-{node}"
            run_dir.mkdir()
            for rank in range(node * ranks, (node + 1) * ranks):
                record_all_metrics(Recorder(shared, rank), is_main=rank == 0)
            options = [f"--shared={shared}", f"--run-dir={run_dir}", "--port=0"]
            command = [sys.executable, "-m", "mixmae.monitoring.exporter.server", *options]
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        yield [_url_of(folder / f"run-{node}") for node in range(nodes)]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def record_all_metrics(recorder: Recorder, is_main: bool) -> None:
    """Records every metric of a rank, with the maximum number of label values."""
    for metric in METRICS:
        if metric.source is Source.RANK or (metric.source is Source.MAIN and is_main):
            for labels in _labels(metric):
                if metric.kind is Kind.HISTOGRAM:
                    for seconds in STEP_BUCKETS:
                        recorder.observe(metric.name, seconds, *labels)
                else:
                    recorder.set(metric.name, 1.0, *labels)


def _labels(metric: Metric) -> Iterator[tuple[str, ...]]:
    if metric.states or not metric.labels:
        yield ()
    elif metric.name == "step_part_seconds":
        yield from ((part,) for part in STEP_PHASES)
    else:
        for number in range(VALUES.get(metric.name, 1)):
            yield (f"value {number}",) * len(metric.labels)


def _url_of(run_dir: Path) -> str:
    while not (files := list(targets_folder(run_dir).glob("*.json"))):
        time.sleep(0.05)
    (target,) = json.loads(files[0].read_text())[0]["targets"]
    return f"http://{target}/metrics"


def _fetch(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        content: bytes = answer.read()
    return content
