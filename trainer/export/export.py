"""`mixmae export RUN OUT`: the encoder of a run's newest checkpoint, in fp32, as an encoder directory."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import checkpoint_step, newest_checkpoint
from mixmae.trainer.checkpoints.weights import master_weights
from mixmae.trainer.export.encoder_directory import write_artifact
from mixmae.trainer.run.run_directory import read_recipe


def export(run_dir: Path, out: Path) -> Path:
    """Writes the encoder directory (decoder included) and returns it.

    Raises:
        UsageError: not a run directory, nothing saved in it, or `out` exists.
    """
    recipe = read_recipe(run_dir)
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is None:
        raise UsageError(f"{run_dir} holds no checkpoint yet")
    weights = master_weights(checkpoint)
    encoder, decoder = (
        {name.removeprefix(part): value.float() for name, value in weights.items() if name.startswith(part)}
        for part in ("encoder.", "decoder.")
    )
    sizes = {name: value for name, value in recipe.model.sizes.model_dump(exclude={"drop_path_rate"}).items() if value}
    model_args = {"img_size": recipe.model.img_size, **sizes}
    facts = {"pretraining": {"step": checkpoint_step(checkpoint), **recipe.model.model_dump(mode="json")}}
    write_artifact(
        out, recipe.model.encoder, model_args, encoder, decoder, facts, recipe.data.model_dump(include={"mean", "std"})
    )
    return out


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae export", description="Export a run's encoder for timm.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("out", type=Path, help="encoder directory to write")
    args = parser.parse_args(argv)
    export(args.run, args.out)
    print(f"open it with: import models, timm; timm.create_model('local-dir:{args.out}', pretrained=True)")
    return 0
