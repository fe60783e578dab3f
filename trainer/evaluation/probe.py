"""What frozen features of unmixed images are worth: `mixmae probe ENCODER SHARDS`, and the probe of a run in progress.

Two classifiers, k nearest neighbours by cosine and a ridge regression, learn from a random half of the images and are
tested on the other. Without labels there is effective rank and mean cosine, which show collapse.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixmae.base.errors import UsageError
from mixmae.base.image_size import ImageSize
from mixmae.base.redaction import redact
from mixmae.trainer.data.index import UNLABELLED, ShardIndex
from mixmae.trainer.data.integrity import require_labels
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.to_device import ToDevice
from mixmae.trainer.engine.distributed import Ranks, from_main
from mixmae.trainer.evaluation import knn
from mixmae.trainer.evaluation.features import effective_rank, features_of, mean_cosine
from mixmae.trainer.evaluation.held_out import gather_rows, held_out_batches, require_readable
from mixmae.trainer.evaluation.ridge import fit_ridge
from mixmae.trainer.export.encoder_directory import EncoderConfig, load_encoder, read_config
from mixmae.trainer.recipe.sections.pixels import RGB, PixelFormat

ACCURACY, COLLAPSE = ("knn", "linear"), ("effective_rank", "mean_cosine")
"""Names of figures: with labels, and without."""
_NEIGHBOURS = 10


def check_probe_shards(index: ShardIndex, purpose: str) -> None:
    """Refuses shards that cannot be probed.

    Args:
        purpose: what needs them, for messages: `evaluate.probe`.

    Raises:
        UsageError: fewer than two images, unusable ones, one class only, or labels for some images alone.
    """
    where = redact(index.store.location)
    if len(index) < 2:
        raise UsageError(f"{where} holds one image; {purpose} needs some to learn from and some to test on")
    require_readable(index, purpose)
    labels = index.samples["label"]
    if (labels == UNLABELLED).all():
        return
    require_labels(index, purpose)
    if (labels == labels[0]).all():
        raise UsageError(f"all images in {where} have the label {labels[0]}; {purpose} needs two classes or more")


def labels_of(index: ShardIndex) -> Tensor | None:
    """Labels int64 [N]; None where no image has one."""
    labels = torch.from_numpy(index.samples["label"].astype(np.int64))
    return None if (labels == UNLABELLED).all() else labels


def probe(x: Tensor, labels: Tensor | None, seed: int = 0) -> dict[str, float]:
    """The figures of features [N, C] by name; NaN where a feature is not finite.

    `knn` and `linear` are top-1 shares of a random half of the images, after learning from the other half, of features
    that are standardised by that one. Without labels there are `effective_rank` and `mean_cosine` alone.
    """
    if not x.isfinite().all():
        return dict.fromkeys(COLLAPSE if labels is None else (*ACCURACY, *COLLAPSE), math.nan)
    collapse = dict(zip(COLLAPSE, (effective_rank(x), mean_cosine(x)), strict=True))
    if labels is None:
        return collapse
    _, labels = labels.unique(return_inverse=True)
    num_classes = int(labels.max()) + 1
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order.tensor_split([len(x) - len(x) // 2])
    x = (x - x[train].mean(0)) / (x[train].std(0, correction=0) + 1e-6)
    neighbours = knn.nearest(knn.Bank(x[train], labels[train]), x[test], _NEIGHBOURS, Ranks())
    by_neighbours = knn.ranking(neighbours, _NEIGHBOURS, num_classes)[:, 0]
    by_ridge = fit_ridge(x[train], labels[train], num_classes).predict(x[test])
    shares = [_share(predicted, labels[test]) for predicted in (by_neighbours, by_ridge)]
    return dict(zip(ACCURACY, shares, strict=True)) | collapse


def _share(predicted: Tensor, true: Tensor) -> float:
    return float((predicted == true).double().mean())


def probe_shards(
    pool: Callable[[Tensor], Tensor],
    index: ShardIndex,
    size: ImageSize,
    to_device: ToDevice,
    ranks: Ranks,
    batch: int = 64,
    threads: int = 1,
    beat: Callable[[], None] = lambda: None,
    pixels: PixelFormat = RGB,
) -> dict[str, float]:
    """`probe` of all images of a shard directory, whose features all ranks compute together; the same on every rank.

    Args:
        pool: images [B, 3, H, W] to features [B, C], without gradients.
        batch: images at once on each rank.
        threads: that decode on each rank.
        pixels: that images have to have.

    Raises:
        UsageError: an image cannot be read.
    """
    batches = held_out_batches(index, size, batch, ranks, threads=threads, beat=beat, pixels=pixels)
    own = features_of(pool, batches, to_device)
    x = gather_rows(own, len(index), ranks)
    # On the main rank's CPU: a GPU that trains may have no memory to spare.
    figures = probe(x.cpu(), labels_of(index)) if ranks.is_main else {}
    return figures if ranks.world_size == 1 else from_main(figures)


def _open(directory: Path, pretrained: bool, device: torch.device) -> tuple[nn.Module, EncoderConfig]:
    """An encoder directory, or its twin with random weights, and its config.json."""
    torch.manual_seed(0)
    return load_encoder(directory, pretrained, num_classes=0).eval().to(device), read_config(directory)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae probe", description="kNN and linear probe of frozen features.")
    parser.add_argument("encoder", type=Path, help="encoder directory")
    parser.add_argument("shards", help="labelled shards; half of the images teach, the other half test")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    index, ranks = open_index(args.shards), Ranks()
    check_probe_shards(index, "a probe")
    labels = labels_of(index)
    found: dict[str, Any] = {} if labels is None else {"classes": int(labels.max()) + 1}
    for name, pretrained in (("pretrained", True), ("untrained", False)):
        encoder, config = _open(args.encoder, pretrained, ranks.device)
        facts, pixels = config.pretrained_cfg, config.pixels
        to_device = ToDevice(ranks.device, facts.mean, facts.std, pixels.scale)
        threads = len(os.sched_getaffinity(0))
        size = facts.input_size[1:]
        found[name] = probe_shards(encoder, index, size, to_device, ranks, threads=threads, pixels=pixels)
        print(f"{name:<12} {describe(found[name])}", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def describe(figures: dict[str, float]) -> str:
    """Figures of a probe in a line."""
    shown = {
        "knn": "kNN {:6.1%}",
        "linear": "linear {:6.1%}",
        "effective_rank": "effective rank {:.1f}",
        "mean_cosine": "mean cosine {:.3f}",
    }
    return "   ".join(text.format(figures[name]) for name, text in shown.items() if name in figures)
