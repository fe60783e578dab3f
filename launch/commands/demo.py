"""`mixmae demo`: from images to a classifier on two DeepSpeed ranks, each step by the command that a user would type.

An encoder is pretrained, probed, and fine-tuned with few labels, beside one that starts from random weights.
"""

import argparse
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mixmae.base import jsonl
from mixmae.base.errors import UsageError
from mixmae.base.run_directory import EVENTS

MARK = ".made-by-mixmae-demo"
"""An empty file in every folder that the demo makes. Folders without it are somebody else's, and never removed."""
FOLDERS = ("shards", "probe-shards", "few-labels", "run", "encoder", "finetuned", "from-scratch")

_LABELLED = 180
"""Images to fine-tune on: 10 of each class."""


def steps(folder: Path, images: int, seed: int, plots: bool) -> list[list[str]]:
    """The commands, in order; each is an argument list behind `mixmae`.

    Args:
        plots: whether curves are drawn, which needs the extra `plots`.
    """
    shards, held_out, few, run, encoder, finetuned, scratch = (str(folder / name) for name in FOLDERS)
    size = ["--img-size", "96", "--shard-size", "8MB"]
    labels = [f"data.shards={few}", f"evaluate.shards={held_out}", f"seed={seed}"]
    finetune = ["launch", "finetune/demo", "--local", "2", *labels]
    return [
        ["shards", "synth", shards, "--images", str(images), *size],
        ["shards", "synth", held_out, "--images", str(images // 2), "--seed", "1", *size],
        ["shards", "synth", few, "--images", str(_LABELLED), "--seed", "2", *size],
        ["launch", "pretrain/demo", "--local", "2", f"run_dir={run}", f"data.shards={shards}", f"seed={seed}"],
        ["export", run, encoder],
        ["probe", encoder, held_out, "--json", str(_probe_result(folder))],
        [*finetune, f"run_dir={finetuned}", f"encoder.init={encoder}"],
        [*finetune, f"run_dir={scratch}"],
        *([["curves", run, str(_loss_curve(folder))]] if plots else []),
        *([["curves", finetuned, scratch, str(_finetuning(folder))]] if plots else []),
    ]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything it makes")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    remove_earlier(args.out)
    started, plots = time.monotonic(), importlib.util.find_spec("matplotlib") is not None
    try:
        (args.out / "run").mkdir(parents=True)
        for step in steps(args.out, args.images, args.seed, plots):
            print(f"\n$ mixmae {shlex.join(step)}", flush=True)
            code = _run(step, args.out)
            if code:
                return code
    except OSError as error:
        raise UsageError(f"--out {args.out}: {error.strerror} ({error.filename}); name another folder") from error
    print(_summary(args.out, time.monotonic() - started, plots))
    return 0


def remove_earlier(folder: Path) -> None:
    """Removes the folders of an earlier demo.

    Raises:
        UsageError: one of these names is a folder or file that no demo made; then nothing is removed.
    """
    there = [path for name in FOLDERS if (path := folder / name).exists() or path.is_symlink()]
    for path in there:
        if path.is_symlink() or not (path / MARK).is_file():
            raise UsageError(
                f"{path} was not made by 'mixmae demo' (it has no {MARK}); move it away, or name another folder "
                "with --out"
            )
    try:
        for path in there:
            shutil.rmtree(path)
    except OSError as error:
        raise UsageError(f"cannot remove {error.filename} of an earlier demo: {error.strerror}") from error


def _run(step: Sequence[str], folder: Path) -> int:
    """Runs a command; marks what folders there are then, however it ended: all were missing when the demo began."""
    _mark_folders(folder)
    try:
        return subprocess.call([sys.executable, "-m", "mixmae.launch.cli", *step])
    finally:
        _mark_folders(folder)


def _mark_folders(folder: Path) -> None:
    for name in FOLDERS:
        if (folder / name).is_dir():
            (folder / name / MARK).touch()


def _probe_result(folder: Path) -> Path:
    return folder / "encoder" / "probe.json"


def _loss_curve(folder: Path) -> Path:
    return folder / "run" / "loss.png"


def _finetuning(folder: Path) -> Path:
    return folder / "finetuned" / "beside-scratch.png"


def _top1(run: Path) -> float:
    """Of the last evaluation."""
    *_, last = (event for event in jsonl.read(run / EVENTS, "event") if event["event"] == "evaluation")
    return float(last["metrics"]["top1"])


def _summary(folder: Path, seconds: float, plots: bool) -> str:
    found = json.loads(_probe_result(folder).read_text())
    pictures = sorted((folder / "run" / "pictures").glob("*.png"))
    trained, untrained = found["pretrained"], found["untrained"]
    curves = "needs matplotlib: pip install mixmae[plots]"
    if plots:
        curves = f"{_loss_curve(folder)}, {_finetuning(folder)}"
    rows = [
        f"linear probe      {trained['linear']:6.1%}   (untrained encoder {untrained['linear']:.1%}, chance "
        f"{1 / found['classes']:.1%})",
        f"nearest neighbour {trained['knn']:6.1%}   (untrained encoder {untrained['knn']:.1%})",
        f"fine-tuned        {_top1(folder / 'finetuned'):6.1%}   (from random weights "
        f"{_top1(folder / 'from-scratch'):.1%}; {_LABELLED} labelled images)",
        f"curves            {curves}",
        f"reconstructions   {pictures[-1]}",
        f"encoder           {folder / 'encoder'}",
        f"everything else   {folder / 'run'}   (tensorboard --logdir {folder / 'run' / 'tensorboard'})",
        f"use it            import mixmae, timm; timm.create_model('local-dir:{folder / 'encoder'}', pretrained=True)",
    ]
    return f"\nMixMAE demo, {seconds / 60:.1f} minutes\n  " + "\n  ".join(rows)
