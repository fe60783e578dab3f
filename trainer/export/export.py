"""`mixmae export RUN OUT`: the encoder of a checkpoint, by default the newest, in fp32, as an encoder directory.

A fine-tuned or probed one has its classifier, and the names of its classes (`label_names`, where timm looks for them).
A detector or segmenter is exported as a whole, as a task directory. With `--format onnx` an encoder directory also
holds the forward pass as `model.onnx`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import checkpoint_step, complete_checkpoints, newest_checkpoint
from mixmae.trainer.checkpoints.manifest import DamagedError, Manifest
from mixmae.trainer.checkpoints.weights import model_weights
from mixmae.trainer.evaluation.held_out import evaluation_crop
from mixmae.trainer.export.encoder_directory import write_encoder_directory
from mixmae.trainer.export.linear_head import linear_head
from mixmae.trainer.export.model_card import model_card
from mixmae.trainer.export.onnx_model import ONNX, require_onnx, write_onnx
from mixmae.trainer.export.task_config import task_recipe
from mixmae.trainer.export.task_directory import write_task_directory
from mixmae.trainer.run.provenance import read_recipe
from mixmae.trainer.tasks.encoder import sizes_of
from mixmae.trainer.tasks.registry import task_of

_PREFIX = "encoder."
_TRAINING_ONLY = ("drop_rate", "drop_path_rate")
_OF_PIXELS = {"channels", "dtype", "scale", "nodata"}
"""Keys of `data:` that say what pixels are."""


def export(run_dir: Path, out: Path, step: int | None = None, with_onnx: bool = False) -> Path:
    """Writes the encoder directory, with the method's own weights or the classifier's head, or the task directory, and
    returns it.

    Args:
        step: of the checkpoint; None for the newest.
        with_onnx: the directory also holds `model.onnx`.

    Raises:
        UsageError: not a run directory, no such checkpoint in it, `out` exists, or packages for ONNX are missing.
    """
    if with_onnx:
        require_onnx()
    recipe = read_recipe(run_dir)
    checkpoint = _checkpoint(run_dir, step)
    try:
        weights = model_weights(checkpoint)
    except DamagedError as error:
        raise UsageError(f"{checkpoint} is damaged: {error}; restore it from a copy") from error
    task, card = task_of(recipe), model_card(recipe, Manifest.read(checkpoint), run_dir)
    if task.exports_whole:
        if with_onnx:
            raise UsageError(
                f"--format onnx: a run of task={recipe.task} is exported as a whole, for PyTorch; leave it out"
            )
        write_task_directory(out, task.recipe, weights, {"training": {"step": checkpoint_step(checkpoint)}}, card)
        return out
    encoder = {name.removeprefix(_PREFIX): value for name, value in weights.items() if name.startswith(_PREFIX)}
    rest = {name: value for name, value in weights.items() if not name.startswith(_PREFIX)}
    part, method, trained = recipe.encoder, recipe.method, recipe.classification
    input_facts = recipe.data.model_dump(include={"mean", "std"})
    facts: dict[str, Any] = {
        "pretraining": {"step": checkpoint_step(checkpoint), "method": method.model_dump(mode="json")}
    }
    if recipe.task == "linear":
        encoder |= linear_head(recipe, checkpoint, weights)
    if trained.num_classes is not None:
        input_facts |= {"crop_pct": evaluation_crop(recipe), "label_names": trained.classes or None}
        facts = {"finetuning": {"step": checkpoint_step(checkpoint), "multi_label": trained.multi_label}}
    if pixels := recipe.data.model_dump(mode="json", include=_OF_PIXELS, exclude_defaults=True):
        facts["data"] = pixels
    write_encoder_directory(
        out,
        part.name,
        {key: value for key, value in sizes_of(recipe).items() if key not in _TRAINING_ONLY},
        encoder,
        (method.name, rest) if trained.num_classes is None else None,
        facts,
        input_facts,
        card,
        write_onnx if with_onnx else None,
    )
    return out


def _checkpoint(run_dir: Path, step: int | None) -> Path:
    found = {checkpoint_step(checkpoint): checkpoint for checkpoint in complete_checkpoints(run_dir)}
    newest = newest_checkpoint(run_dir)
    if newest is None:
        raise UsageError(f"{run_dir} holds no checkpoint yet")
    if step is None:
        return newest
    if step not in found:
        raise UsageError(f"--step {step}: {run_dir} holds checkpoints of the steps {', '.join(map(str, found))}")
    return found[step]


def main(argv: Sequence[str]) -> int:
    what = "Export a run's encoder for timm, also as ONNX, or its detector or segmenter as a whole."
    parser = argparse.ArgumentParser(prog="mixmae export", description=what)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("out", type=Path, help="encoder directory to write")
    parser.add_argument("--step", type=int, metavar="N", help="of the checkpoint; default: the newest")
    parser.add_argument(
        "--format",
        choices=("timm", "onnx"),
        default="timm",
        help=f"onnx: the directory also holds {ONNX}, for images of the run's size (default %(default)s)",
    )
    args = parser.parse_args(argv)
    export(args.run, args.out, args.step, args.format == "onnx")
    if task_recipe(args.out) is not None:
        print(f"use it with: mixmae predict {args.out} IMAGE ... --out FOLDER")
        return 0
    print(f"open it with: import mixmae, timm; timm.create_model('local-dir:{args.out}', pretrained=True)")
    if args.format == "onnx":
        print(f"or: import onnxruntime; onnxruntime.InferenceSession('{args.out / ONNX}').run(None, {{'images': ...}})")
    return 0
