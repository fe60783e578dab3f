"""`python -m mixmae.trainer.benchmarks.gpu`: the list for one GPU, what matters most first, in eight minutes.

Each part is a process of its own with a limit of its own, writes what it finds at once, and cannot stop those behind
it. `--dry` does the same list with a small model in fp32, wherever it runs.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
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
_FAST = ("train.compile=true", "train.fused_attention=true", "train.zero_stage=2")
_ANYWHERE = ("plain-autocast", "grouped", "masked", "selective")
"""Variants that need neither a GPU nor a minute of a compiler's time."""
_UNHURRIED = 10
"""Times a part's limit that it has in a dry run: that is not about speed, and machines that test are busy."""
_LEAST = 0.5
"""Share of its limit without which a part is left out: it starts processes and compiles before it measures."""


@dataclass(frozen=True)
class Part:
    """Arguments of Python, and the seconds that they may take."""

    name: str
    seconds: float
    arguments: tuple[str, ...]


def parts() -> list[Part]:
    """What is measured; K = 2 has published operations per image (722 GFLOP for Swin-H), K = 4 is the recipes'."""
    headline = "plain-autocast,compiled-triton"  # what is compared with comes first
    return [
        Part("parity", 125, ("-m", "pytest", "-m", "gpu", "--timeout", "100", *_workers(), *_gpu_tests())),
        _step("swin_huge", "64,128", headline, 2, 140),
        _step("swin_base_w14", "128,256", headline, 2, 120),
        _loop("swin_base_w14", 128, 4),
        _data(),
        _loop("swin_huge", 64, 4),
        _step("swin_huge", "128", "compiled-triton", 4, 80),
        _step("swin_base_w14", "256", headline, 4, 80),
        _step("swin_huge", "64", "compiled,grouped,masked,selective", 2, 90),
        _step("swin_base_w14", "128", "compiled,grouped,masked,triton", 2, 80),
        _step("swin_large", "128", headline, 2, 90),
    ]


def small(part: Part) -> Part:
    """The same for a dry run: a model that any machine computes, without what only a GPU can."""
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
    given: list[str] = []
    for argument in part.arguments:
        name, equals, _ = argument.partition("=")
        if given and given[-1] == "--variant":
            given.append(",".join(name for name in argument.split(",") if name in _ANYWHERE) or "grouped")
        elif given and given[-1] in changes:
            given.append(changes[given[-1]])
        elif equals and name in changes:
            given.append(f"{name}={changes[name]}")
        elif argument not in ("train.compile=true", "train.fused_attention=true"):
            given.append(argument)
    if part.name.startswith("step"):
        given[4:4] = ["--precision", "fp32"]
    if part.name != "parity":
        given += _SMALL
    return Part(part.name, _UNHURRIED * part.seconds, tuple(given))


def _step(model: str, batches: str, variants: str, num_images: int, seconds: float) -> Part:
    options = ("--model", f"mixmae_{model}", "--batch", batches, "--variant", variants, "--steps", "5", "--json")
    kernels = ("--kernels", str(RESULTS / "kernels.txt"))
    arguments = ("-m", "mixmae.launch.cli", "bench", "step", *options, *kernels, f"method.num_images={num_images}")
    return Part(f"step {model} {batches} K={num_images}", seconds, arguments)


def _loop(model: str, batch: int, rounds: int) -> Part:
    options = ("--model", f"mixmae_{model}", "--batch", str(batch), "--rounds", str(rounds))
    written = ("--json", str(RESULTS / f"loop-gpu-mixmae_{model}.json"))
    more = ("log.every=20", "checkpoint.asynchronous=false", "method.num_images=2", *_FAST)
    return Part(f"loop {model}", 75, ("-m", "mixmae.launch.cli", "bench", "loop", *options, *written, *more))


def _data() -> Part:
    options = ("--photos", "--images", "600", "--seconds", "3", "--rounds", "2", f"--json={RESULTS}")
    recipe = ("configs/pretrain/swin_base_w14.yaml", "data.num_workers=14", "train.micro_batch=128")
    return Part("data", 60, ("-m", "mixmae.launch.cli", "bench", "data", *options, *recipe))


def _workers() -> tuple[str, ...]:
    """Tests beside each other, where pytest can; most of their time goes to compilers on the host."""
    workers = str(max(1, (os.cpu_count() or 1) - 2))
    return ("-n", workers, "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()


def _gpu_tests() -> tuple[str, ...]:
    """Files with tests for a GPU alone: others need packages that are not there."""
    files = [*Path("tests/models").rglob("test_*.py"), *Path("tests/trainer").rglob("test_*.py")]
    return tuple(str(file) for file in sorted(files) if "mark.gpu" in file.read_text())


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m mixmae.trainer.benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="a small model, on whatever there is")
    parser.add_argument("--minutes", type=float, default=8.0, help="for the whole list (default %(default)s)")
    parser.add_argument("--only", default="", help="parts whose names begin so, several with commas")
    args = parser.parse_args(argv)
    if not args.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --dry does the list without")
    RESULTS.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in parts() if part.name.startswith(tuple(args.only.split(",")))]
    return 1 if run([small(part) if args.dry else part for part in chosen], args.minutes * 60) else 0


def run(chosen: Sequence[Part], seconds: float) -> list[str]:
    """Does the parts in their order while there is time; returns the names of those that failed or were left out."""
    failed, deadline = [], time.monotonic() + seconds
    for part in chosen:
        started = time.monotonic()
        limit = min(part.seconds, deadline - started)
        ended = _ended(part, limit) if limit >= _LEAST * part.seconds else "left out: no time"
        print(f"== {part.name}: {ended}, {time.monotonic() - started:.0f} s", flush=True)
        if ended != "done":
            failed.append(part.name)
    return failed


def _ended(part: Part, limit: float) -> str:
    print(f"== {part.name}: python {' '.join(part.arguments)}", flush=True)
    # Batches of several sizes follow each other: blocks of fixed sizes would lie about unused.
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
    process = subprocess.Popen([sys.executable, *part.arguments], start_new_session=True, env=environment)
    try:
        code = process.wait(limit)
        return "done" if code == 0 else f"failed with {code}"
    except subprocess.TimeoutExpired:
        return f"ended after its {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it started, which would hold the GPU's memory
        process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
