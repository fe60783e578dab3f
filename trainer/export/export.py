"""`mixmae export RUN OUT`: the encoder of a checkpoint, by default the newest, in fp32, as an encoder directory."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import checkpoint_step, complete_checkpoints, newest_checkpoint
from mixmae.trainer.checkpoints.weights import master_weights
from mixmae.trainer.export.encoder_directory import write_encoder_directory
from mixmae.trainer.run.provenance import read_recipe

_PREFIX = "encoder."
_TRAINING_ONLY = ("drop_rate", "drop_path_rate")


def export(run_dir: Path, out: Path, step: int | None = None) -> Path:
    """Writes the encoder directory (with the method's own weights) and returns it.

    Args:
        step: of the checkpoint; None for the newest.

    Raises:
        UsageError: not a run directory, no such checkpoint in it, or `out` exists.
    """
    recipe = read_recipe(run_dir)
    checkpoint = _checkpoint(run_dir, step)
    weights = {name: value.float() for name, value in master_weights(checkpoint).items()}
    encoder = {name.removeprefix(_PREFIX): value for name, value in weights.items() if name.startswith(_PREFIX)}
    rest = {name: value for name, value in weights.items() if not name.startswith(_PREFIX)}
    part, method = recipe.encoder, recipe.method
    write_encoder_directory(
        out,
        part.name,
        {"img_size": part.img_size, **{key: v for key, v in part.settings.items() if key not in _TRAINING_ONLY}},
        encoder,
        (method.name, rest),
        {"pretraining": {"step": checkpoint_step(checkpoint), "method": method.model_dump(mode="json")}},
        recipe.data.model_dump(include={"mean", "std"}),
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
    parser = argparse.ArgumentParser(prog="mixmae export", description="Export a run's encoder for timm.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("out", type=Path, help="encoder directory to write")
    parser.add_argument("--step", type=int, metavar="N", help="of the checkpoint; default: the newest")
    args = parser.parse_args(argv)
    export(args.run, args.out, args.step)
    print(f"open it with: import mixmae, timm; timm.create_model('local-dir:{args.out}', pretrained=True)")
    return 0
