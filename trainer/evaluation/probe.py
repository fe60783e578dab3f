"""`mixmae probe ENCODER SHARDS`: how well classes can be told apart in an encoder's frozen features.

Two probes on mean-pooled features of unmixed images: the k nearest neighbours by cosine, and a linear classifier.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmae.base.errors import UsageError
from mixmae.trainer.data.decode import center_resized_crop
from mixmae.trainer.data.faults import UnusableError
from mixmae.trainer.data.index import ShardIndex, open_index
from mixmae.trainer.data.stream import ToDevice
from mixmae.trainer.export.encoder_directory import load_encoder, read_config

_LEAST = 4
"""Images of which half have a standard deviation."""


class Accuracy(NamedTuple):
    """Top-1 shares of the held-out images."""

    knn: float
    linear: float


def open_encoder(directory: Path, pretrained: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """An encoder directory as a model that gives pooled features, and timm's facts about its input.

    Args:
        pretrained: False for its twin with random weights.

    Raises:
        UsageError: not an encoder directory.
    """
    encoder = load_encoder(directory, pretrained, num_classes=0).eval()
    return encoder, read_config(directory).pretrained_cfg.model_dump()


@torch.inference_mode()
def features(encoder: nn.Module, facts: dict[str, Any], index: ShardIndex, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Pooled features [N, C] and labels [N] of every image of a shard directory, on the CPU.

    Raises:
        UsageError: an image cannot be read.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder.to(device)
    to_device = ToDevice(device, facts["mean"], facts["std"])
    found = []
    for first in range(0, len(index), batch):
        views = [
            _view(index, sample, facts["input_size"][1]) for sample in range(first, min(first + batch, len(index)))
        ]
        found.append(encoder(to_device(torch.stack(views))).float().cpu())
    return torch.cat(found), torch.from_numpy(index.samples["label"].astype(np.int64))


def _view(index: ShardIndex, sample: int, size: int) -> Tensor:
    try:
        return center_resized_crop(index.read(sample), int(index.samples[sample]["state"]), size)
    except UnusableError as error:
        raise UsageError(f"{index.name_of(sample)} cannot be used: {error.reason.label}, {error}") from error


def probe(x: Tensor, labels: Tensor, seed: int = 0, neighbours: int = 10) -> Accuracy:
    """Accuracies of both probes, on a random half of the images after learning from the other half."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order.chunk(2)
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
    return Accuracy(
        _share(_nearest(x[train], labels[train], x[test], neighbours), labels[test]),
        _share(_linear(x[train], labels[train], x[test]), labels[test]),
    )


def _nearest(known: Tensor, labels: Tensor, unknown: Tensor, neighbours: int) -> Tensor:
    similarity = F.normalize(unknown, dim=1) @ F.normalize(known, dim=1).T
    weight, place = similarity.topk(min(neighbours, len(known)), dim=1)
    votes = torch.zeros(len(unknown), int(labels.max()) + 1)
    return votes.scatter_add_(1, labels[place], weight.clamp(min=0)).argmax(1)


def _linear(known: Tensor, labels: Tensor, unknown: Tensor, decay: float = 1e-2) -> Tensor:
    """Multinomial logistic regression with a quadratic penalty, solved by L-BFGS."""
    weight = torch.zeros(known.shape[1], int(labels.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(known @ weight + bias, labels) + decay * weight.square().sum() / 2
        loss.backward()
        return loss

    solver.step(objective)
    return (unknown @ weight + bias).argmax(1).detach()


def _share(predicted: Tensor, true: Tensor) -> float:
    return float((predicted == true).float().mean())


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae probe", description="kNN and linear probe of frozen features.")
    parser.add_argument("encoder", type=Path, help="encoder directory")
    parser.add_argument("shards", type=Path, help="labelled shards; half of the images teach, the other half test")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    index = open_index(args.shards)
    if len(index) < _LEAST:
        raise UsageError(f"{args.shards} holds {len(index)} images; a probe needs {_LEAST}, half of them to test on")
    if (index.samples["label"] < 0).any():
        raise UsageError(f"{args.shards} holds images without a label; a probe needs a .cls beside every image")
    found: dict[str, Any] = {"classes": int(index.samples["label"].max()) + 1}
    for name, pretrained in (("pretrained", True), ("untrained", False)):
        torch.manual_seed(0)
        encoder, facts = open_encoder(args.encoder, pretrained)
        accuracy = probe(*features(encoder, facts, index))
        print(f"{name:<12} kNN {accuracy.knn:6.1%}   linear {accuracy.linear:6.1%}", flush=True)
        found[name] = accuracy._asdict()
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0
