"""`mixmae predict MODEL IMAGE ...`: what a classifier takes images for; what a detector or segmenter finds, drawn."""

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.trainer.data.decode import center_resized_crop
from mixmae.trainer.data.encoded_image import to_rgb
from mixmae.trainer.data.faults import Reason, UnusableError, is_usable
from mixmae.trainer.data.inspection import inspect_image
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.evaluation.frozen_model import TOP, FrozenModel, open_model
from mixmae.trainer.export.task_config import task_recipe
from mixmae.trainer.export.task_directory import open_task_directory
from mixmae.trainer.tasks.contract import SHOWN_SCORE

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


def _content(file: Path) -> tuple[bytes, int]:
    """An image's bytes, and how they decode."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}; name an image") from error
    if not is_usable(state := inspect_image(content)):
        raise UsageError(f"{file} cannot be used as an image: {Reason(state).label}")
    return content, state


def _view(file: Path, model: FrozenModel) -> Tensor:
    content, state = _content(file)
    try:
        return center_resized_crop(content, state, model.size, model.crop_ratio, model.pixels)
    except UnusableError as error:
        raise UsageError(f"{file} cannot be used as an image: {error.reason.label}, {error}") from error


def draw_predictions(model: Path, files: Sequence[Path], out: Path | None, as_json: bool, min_score: float) -> None:
    """Prints what a detector or segmenter finds in each image, and draws it into OUT/NAME.png.

    Raises:
        UsageError: no folder to draw into, two images of one name, or a file that is no image.
    """
    if out is None:
        raise UsageError(f"{model} draws what it finds; name a folder for the pictures: --out FOLDER")
    names = [file.stem for file in files]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two images are called {twice}; name them one after the other, with other folders for --out")
    out.mkdir(parents=True, exist_ok=True)
    device = Ranks().device
    task, module = open_task_directory(model, device)
    for file in files:
        found = task.predict(module, _whole(file), device, min_score)
        picture = out / f"{file.stem}.png"
        found.picture.save(picture)
        if as_json:
            print(json.dumps({"image": str(file), "picture": str(picture), **found.facts}))
        else:
            lines = found.lines or [f"nothing with a score of {min_score} and more (--min-score)"]
            print("\n".join([f"{file}: {picture}", *(f"  {line}" for line in lines)]))


def _whole(file: Path) -> Tensor:
    """An image upright, uint8 [3, H, W]."""
    content, _ = _content(file)
    try:
        image = to_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    except (OSError, ValueError, SyntaxError) as error:
        raise UsageError(f"{file} cannot be used as an image: {error}") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae predict", description=__doc__)
    parser.add_argument("model", help="directory of 'mixmae export' or 'import', or a name that timm knows")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--top", type=int, default=TOP, metavar="N", help="classes to name (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="a JSON object for each image, one a line")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for pictures of what detectors and segmenters find")
    parser.add_argument(
        "--min-score",
        type=float,
        default=SHOWN_SCORE,
        metavar="S",
        help="of objects that are shown (default %(default)s)",
    )
    args = parser.parse_intermixed_args(argv)
    if args.top < 1:
        raise UsageError(f"--top {args.top}: expected 1 or more")
    if not 0 <= args.min_score <= 1:
        raise UsageError(f"--min-score {args.min_score}: expected 0 to 1")
    if task_recipe(Path(args.model)) is not None:
        draw_predictions(Path(args.model), args.images, args.out, args.json, args.min_score)
        return 0
    if args.out is not None:
        raise UsageError(f"--out {args.out}: {args.model} classifies images, and draws nothing; leave it out")
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
