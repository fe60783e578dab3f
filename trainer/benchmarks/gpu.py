"""`python -m mixmae.trainer.benchmarks.gpu`: tests and benchmarks for one GPU by priority, in eight minutes.

Each part is a process with its own time limit, writes its results at once, and cannot block later parts. `--dry` runs
the suite with a small model in fp32 on any machine.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from mixmae.trainer.benchmarks.results import RESULTS

_SMALL = (
    "encoder.img_size=64",
    "encoder.embed_dim=32",
    "encoder.depths=[1,1,1,1]",
    "encoder.num_heads=[1,1,2,2]",
    "encoder.window_size=[4,4,4,2]",
    "method.decoder_dim=32",
    "method.decoder_depth=1",
    "method.decoder_num_heads=2",
)
_RUNS = "tests/trainer/run/test_on_a_gpu.py"
_INTERRUPTED = 10.0
"""Seconds in which a part that took too long may say how far it has come."""
_ANYWHERE = ("plain-autocast", "grouped", "masked", "selective")
"""Variants that need neither a GPU nor long compilation."""
_DRY_RUN_FACTOR = 10
"""Multiplies time limits in a dry run, which may be on a busy CPU."""
_MIN_TIME = 0.5
"""Fraction of its limit below which a part is skipped: it starts processes and compiles before it measures."""


@dataclass(frozen=True)
class Part:
    """Arguments of a Python process, its time limit, and what is added to its environment."""

    name: str
    seconds: float
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def parts() -> list[Part]:
    """The suite; K = 2 has published operations per image (722 GFLOP for Swin-H), K = 4 is the recipes' setting."""
    headline = "plain-autocast,compiled-triton,compiled-window"  # the reference comes first
    return [
        _tests("parity", 125, *_gpu_tests()),
        Part("window", 30, ("-m", "mixmae.launch.cli", "bench", "window", "--batch", "64", "--rounds", "10", "--json")),
        _step("swin_huge", "64,128", headline, 2, 170),
        _step("swin_base_w14", "128,256", headline, 2, 150),
        _loop("swin_base_w14", 128, 4),
        _tests("runs", 80, _RUNS),
        _data(),
        _loop("swin_huge", 64, 4),
        _step("swin_huge", "128", "compiled-window", 4, 80),
        _step("swin_base_w14", "256", headline, 4, 80),
        _step("swin_huge", "64", "compiled,grouped,masked,selective,graphed", 2, 100),
        _step("swin_base_w14", "128", "compiled,grouped,masked,triton,window", 2, 80),
        _step("swin_large", "128", headline, 2, 90),
    ]


def small(part: Part) -> Part:
    """The part for a dry run: a small model, without variants for GPUs."""
    changes = {
        "--model": "mixmae_swin_nano",
        "--batch": "4",
        "--rounds": "1",
        "--steps": "1",
        "--seconds": "0.1",
        "--images": "24",
        "log.every": "2",
        "train.micro_batch": "8",
        "data.num_workers": "1",
    }
    arguments: list[str] = []
    for argument in part.arguments:
        name, equals, _ = argument.partition("=")
        if arguments and arguments[-1] == "--variant":
            arguments.append(",".join(name for name in argument.split(",") if name in _ANYWHERE) or "grouped")
        elif arguments and arguments[-1] in changes:
            arguments.append(changes[arguments[-1]])
        elif equals and name in changes:
            arguments.append(f"{name}={changes[name]}")
        else:
            arguments.append(argument)
    if part.name.startswith("step"):
        arguments[4:4] = ["--precision", "fp32"]
    if part.name not in ("parity", "runs", "window"):
        arguments += _SMALL
    environment = {"TRITON_INTERPRET": "1"} if part.name == "window" else part.environment
    return replace(part, seconds=_DRY_RUN_FACTOR * part.seconds, arguments=tuple(arguments), environment=environment)


def _step(model: str, batches: str, variants: str, num_images: int, seconds: float) -> Part:
    options = ("--model", f"mixmae_{model}", "--batch", batches, "--variant", variants, "--steps", "5", "--json")
    kernels = ("--kernels", str(RESULTS / "kernels.txt"))
    arguments = ("-m", "mixmae.launch.cli", "bench", "step", *options, *kernels, f"method.num_images={num_images}")
    return Part(f"step {model} {batches} K={num_images}", seconds, arguments)


def _loop(model: str, batch: int, rounds: int) -> Part:
    options = ("--model", f"mixmae_{model}", "--batch", str(batch), "--rounds", str(rounds))
    written = ("--json", str(RESULTS / f"loop-gpu-mixmae_{model}.json"))
    more = ("log.every=20", "checkpoint.asynchronous=false", "method.num_images=2")
    return Part(f"loop {model}", 90, ("-m", "mixmae.launch.cli", "bench", "loop", *options, *written, *more))


def _data() -> Part:
    options = ("--photos", "--images", "600", "--seconds", "3", "--rounds", "2", f"--json={RESULTS}")
    recipe = ("configs/pretrain/swin_base_w14.yaml", "data.num_workers=14", "train.micro_batch=128")
    return Part("data", 60, ("-m", "mixmae.launch.cli", "bench", "data", *options, *recipe))


def _tests(name: str, seconds: float, *files: str) -> Part:
    """pytest, which names each test when it has ended; with those of its plugins that are installed. Tests run in
    parallel: they spend most time in compilers on the host, each of which would start one for every core again."""
    workers = str(max(1, (os.cpu_count() or 1) - 2))
    parallel = ("-n", workers, "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    limited = ("--timeout", "100") if importlib.util.find_spec("pytest_timeout") else ()
    arguments = ("-m", "pytest", "-v", "-m", "gpu", *parallel, *limited, *files)
    return Part(name, seconds, arguments, {"TORCHINDUCTOR_COMPILE_THREADS": "1"} if parallel else {})


def _gpu_tests() -> tuple[str, ...]:
    """Files with GPU tests but for whole runs; others may need missing packages."""
    files = [*Path("tests/models").rglob("test_*.py"), *Path("tests/trainer").rglob("test_*.py")]
    return tuple(str(file) for file in sorted(files) if "mark.gpu" in file.read_text() and file != Path(_RUNS))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m mixmae.trainer.benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="run a small model on any machine")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of the suite (default %(default)s)")
    parser.add_argument("--only", default="", help="comma-separated prefixes of names of parts to run")
    args = parser.parse_args(argv)
    if not args.dry and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --dry runs the suite without one")
    RESULTS.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in parts() if part.name.startswith(tuple(args.only.split(",")))]
    return 1 if run([small(part) if args.dry else part for part in chosen], args.minutes * 60) else 0


def run(chosen: Sequence[Part], seconds: float) -> list[str]:
    """Runs the parts in order within the time limit; returns the names of those that failed or were skipped."""
    failed, deadline = [], time.monotonic() + seconds
    for part in chosen:
        started = time.monotonic()
        limit = min(part.seconds, deadline - started - _INTERRUPTED)
        result = _run_part(part, limit) if limit >= _MIN_TIME * part.seconds else "skipped: no time left"
        print(f"== {part.name}: {result}, {time.monotonic() - started:.0f} s", flush=True)
        if result != "done":
            failed.append(part.name)
    return failed


def _run_part(part: Part, limit: float) -> str:
    print(f"== {part.name}: python {' '.join(part.arguments)}", flush=True)
    # Batches of several sizes follow each other: segments of fixed size would fragment memory.
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ, **part.environment}
    process = subprocess.Popen([sys.executable, *part.arguments], start_new_session=True, env=environment)
    try:
        code = process.wait(limit)
        return "done" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # on which pytest sums up
        with suppress(subprocess.TimeoutExpired):
            process.wait(_INTERRUPTED)
        return f"timed out after {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # including child processes, which would hold GPU memory
        process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
