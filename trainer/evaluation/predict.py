"""`mixmae predict MODEL IMAGE ...`: what a classifier takes images for."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.trainer.data.decode import center_resized_crop, inspect_image
from mixmae.trainer.data.faults import Reason, UnusableError
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.evaluation.frozen_model import TOP, FrozenModel, open_model

_BATCH = 32


def predict(model: FrozenModel, files: Sequence[Path]) -> Tensor:
    """Probabilities fp32 [files, classes] on the CPU: of softmax, or each class's own where an image may have several.

    Raises:
        UsageError: a file that is no image.
    """
    probabilities = []
    for first in range(0, len(files), _BATCH):
        _, logits = model(torch.stack([_view(file, model) for file in files[first : first + _BATCH]]))
        assert logits is not None
        probabilities.append((logits.sigmoid() if model.multi_label else logits.softmax(1)).cpu())
    return torch.cat(probabilities)


def _view(file: Path, model: FrozenModel) -> Tensor:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}; name an image") from error
    if (state := inspect_image(content)) >= min(Reason):
        raise UsageError(f"{file} cannot be used as an image: {Reason(state).label}")
    try:
        return center_resized_crop(content, state, model.size, model.crop_ratio)
    except UnusableError as error:
        raise UsageError(f"{file} cannot be used as an image: {error.reason.label}, {error}") from error


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae predict", description=__doc__)
    parser.add_argument("model", help="directory of 'mixmae export' or 'import', or a name that timm knows")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--top", type=int, default=TOP, metavar="N", help="classes to name (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="a JSON object for each image, one a line")
    args = parser.parse_args(argv)
    if args.top < 1:
        raise UsageError(f"--top {args.top}: expected 1 or more")
    model = open_model(args.model, Ranks().device)
    if not model.num_classes:
        raise UsageError(f"{args.model} has no classifier; fine-tune it first: 'mixmae launch finetune/...'")
    for file, shares in zip(args.images, predict(model, args.images), strict=True):
        best = shares.topk(min(args.top, model.num_classes))
        named = [
            (model.describe(n), share) for share, n in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        if args.json:
            print(json.dumps({"image": str(file), "classes": dict(named)}))
        else:
            print(f"{file}\n" + "\n".join(f"  {share:6.1%}  {name}" for name, share in named))
    return 0
