"""`mixmae demo`: shards, two DeepSpeed ranks, export and probe, each by the command that a user would type."""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mixmae.base.errors import UsageError

RECIPE = Path("configs/pretrain/demo.yaml")
OWN = ("shards", "probe-shards", "run", "encoder")


def steps(folder: Path, recipe: Path, images: int, seed: int) -> list[list[str]]:
    """The commands, in order; each is an argument list behind `mixmae`."""
    shards, probe, run, encoder = (str(folder / name) for name in OWN)
    size = ["--img-size", "96", "--shard-size", "8MB"]
    return [
        ["shards", "synth", shards, "--images", str(images), *size],
        ["shards", "synth", probe, "--images", str(images // 2), "--seed", "1", *size],
        ["launch", str(recipe), "--local", "2", f"run_dir={run}", f"data.shards={shards}", f"seed={seed}"],
        ["export", run, encoder],
        ["probe", encoder, probe, "--json", str(folder / "probe.json")],
        ["curves", run, str(folder / "loss.png")],
    ]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything it makes")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not args.recipe.is_file():
        raise UsageError(f"{args.recipe} does not exist; run this where the repository's configs/ is, or give --recipe")
    for name in OWN:  # what an earlier demo left; nothing else in the folder is touched
        shutil.rmtree(args.out / name, ignore_errors=True)
    started = time.monotonic()
    for step in steps(args.out, args.recipe, args.images, args.seed):
        print(f"\n$ mixmae {shlex.join(step)}", flush=True)
        code = subprocess.call([sys.executable, "-m", "mixmae.launch.cli", *step])
        if code:
            return code
    print(_summary(args.out, time.monotonic() - started))
    return 0


def _summary(folder: Path, seconds: float) -> str:
    found = json.loads((folder / "probe.json").read_text())
    pictures = sorted((folder / "run" / "pictures").glob("*.png"))
    trained, untrained = found["pretrained"], found["untrained"]
    rows = [
        f"linear probe      {trained['linear']:6.1%}   (untrained encoder {untrained['linear']:.1%}, chance "
        f"{1 / found['classes']:.1%})",
        f"nearest neighbour {trained['knn']:6.1%}   (untrained encoder {untrained['knn']:.1%})",
        f"loss curve        {folder / 'loss.png'}",
        f"reconstructions   {pictures[-1]}",
        f"encoder           {folder / 'encoder'}",
        f"everything else   {folder / 'run'}   (tensorboard --logdir {folder / 'run' / 'tensorboard'})",
        f"use it            import models, timm; timm.create_model('local-dir:{folder / 'encoder'}', pretrained=True)",
    ]
    return f"\nMixMAE demo, {seconds / 60:.1f} minutes\n  " + "\n  ".join(rows)
