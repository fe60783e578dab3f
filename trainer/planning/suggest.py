"""`mixmae recipes suggest SHARDS --gpus N`: a recipe for a collection and some GPUs, with its reasons as comments.

It is where to start, by rules of thumb that docs/sizing.md explains; nothing of it was searched for.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import indent
from typing import Any

import yaml

from mixmae.base.errors import UsageError
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.planning.advice import keys
from mixmae.trainer.planning.devices import GPUS, build_cluster, find_gpu
from mixmae.trainer.planning.plan import Assumptions, Plan, make_plan
from mixmae.trainer.recipe.arguments import above_0, at_least
from mixmae.trainer.recipe.loading import parse_recipe
from mixmae.trainer.recipe.schema import Recipe


@dataclass(frozen=True)
class Size:
    """An encoder, and from how many images on it is worth its time.

    Attributes:
        micro_batch: images that fit a GPU of 24 GB with room to spare.
    """

    encoder: str
    images: int
    img_size: int
    micro_batch: int

    @property
    def reason(self) -> str:
        if not self.images:
            return "the smallest, for small collections or little time"
        return f"worth its time from {self.images:,} images on, if there is time for {TOO_FEW_EPOCHS} epochs"


LADDER = (
    Size("mixmae_swin_nano", 0, 128, 256),
    Size("mixmae_swin_tiny", 10_000, 224, 64),
    Size("mixmae_swin_small", 100_000, 224, 64),
    Size("mixmae_swin_base_w14", 300_000, 224, 32),
    Size("mixmae_swin_large", 3_000_000, 224, 32),
)
MOST_BATCH, STEPS_AN_EPOCH, LEAST_OF_GPU = 1024, 20, 8
"""The papers' global batch, at most; steps that an epoch should have at the least; images of a step on each GPU."""
LEAST_STEPS, LEAST_EPOCHS, MOST_EPOCHS = 20_000, 300, 1600
TOO_FEW_EPOCHS = 100
"""Below this a smaller encoder learns more in the same time."""
PAPER_LR = 6e-4
"""At the papers' global batch of 1024."""


@dataclass(frozen=True)
class Suggestion:
    """What is suggested, and why the length is what it is."""

    size: Size
    images: int
    gpus: int
    global_batch: int
    epochs: int
    length: str

    @property
    def steps_an_epoch(self) -> float:
        return self.images / self.global_batch

    @property
    def per_gpu(self) -> int:
        return self.global_batch // self.gpus

    @property
    def micro_batch(self) -> int:
        return max(n for n in range(1, self.size.micro_batch + 1) if self.per_gpu % n == 0)

    @property
    def base_lr(self) -> float:
        """For a rate that falls with the root of the batch, as Adam's noise wants it (Malladi et al. 2022)."""
        return PAPER_LR * math.sqrt(self.global_batch / MOST_BATCH) * 256 / self.global_batch

    @property
    def streams(self) -> int:
        """A whole number for each GPU, as many as there may be."""
        per_gpu = max(n for n in range(1, self.per_gpu + 1) if self.per_gpu % n == 0 and n * self.gpus <= 512)
        return per_gpu * self.gpus

    def text(self, shards: str, planned: Sequence[str] = ()) -> str:
        """The recipe as YAML, with its reasons.

        Args:
            planned: `train.` keys of a plan, in place of this recipe's.
        """
        fits = "what fits 24 GB; 'mixmae plan' finds more" if not planned else "by 'mixmae plan' for this GPU"
        every = max(1, round(1000 / self.steps_an_epoch))
        gpus = f"{self.gpus} GPU{'s'[: self.gpus != 1]}"
        content: list[tuple[str, str, dict[str, object]]] = [
            ("encoder", self.size.reason,
             {"name": self.size.encoder, "img_size": self.size.img_size}),
            ("data", f"streams: a whole number for each of {gpus}", {"shards": shards, "streams": self.streams}),
            ("train", self.length, {"duration": f"{self.epochs} epochs"}),
            ("", f"{self.steps_an_epoch:.0f} steps an epoch", {"global_batch": self.global_batch}),
            ("", fits, nested([f"train.micro_batch={self.micro_batch}", *planned])["train"]),
            ("optim", f"{PAPER_LR:g} at a batch of {MOST_BATCH}, below that by the root of the batch",
             {"base_lr": float(f"{self.base_lr:.2e}"), "warmup": f"{min(40, self.epochs // 10)} epochs"}),
            ("checkpoint", "about every 1,000 steps", {"every": f"{every} epoch{'s'[: every != 1]}"}),
            ("log", "optimizer steps", {"every": 50 if self.steps_an_epoch >= 50 else 10}),
        ]  # fmt: skip
        head = [
            f"# mixmae launch RECIPE --local {self.gpus}",
            f"# Suggested for {self.images:,} images on {gpus}; docs/sizing.md has the rules.",
            f"run_dir: runs/{self.size.encoder.removeprefix('mixmae_')}",
        ]
        return "\n".join(head) + "\n" + "".join(_section(*part) for part in content)

    def recipe(self, shards: str) -> Recipe:
        return parse_recipe(yaml.safe_load(self.text(shards)), "the suggested recipe")


def _section(name: str, reason: str, keys: Mapping[str, object]) -> str:
    """Keys under a reason, and under their section's name where it begins."""
    body = yaml.safe_dump(dict(keys), sort_keys=False)
    return (f"{name}:\n" if name else "") + indent(f"# {reason}\n{body}", "  ")


def nested(overrides: Sequence[str]) -> dict[str, Any]:
    """`a.b=value` as nested sections; of a key that comes twice the last."""
    found: dict[str, Any] = {}
    for override in overrides:
        path, _, text = override.partition("=")
        *sections, key = path.split(".")
        here = found
        for section in sections:
            here = here.setdefault(section, {})
        here[key] = yaml.safe_load(text)
    return found


def suggest(images: int, gpus: int, size: Size | None = None, affordable: float = math.inf) -> Suggestion:
    """A suggestion by the number of images.

    Args:
        size: None for the one that so many images are worth.
        affordable: epochs that there is time for.

    Raises:
        UsageError: fewer images than one step takes.
    """
    size = size or max((one for one in LADDER if images >= one.images), key=lambda one: one.images)
    most = max(LEAST_OF_GPU * gpus, min(MOST_BATCH, images // STEPS_AN_EPOCH))
    global_batch = gpus * (1 << ((most // gpus).bit_length() - 1))
    if images < global_batch:
        raise UsageError(
            f"{images} images are fewer than the {global_batch} of one step on {gpus} GPUs; use more images"
        )
    wanted = max(LEAST_EPOCHS, math.ceil(LEAST_STEPS * global_batch / images))
    most_epochs = max(1, math.floor(min(affordable, MOST_EPOCHS)))
    epochs = min(wanted, most_epochs)
    length = (
        "all that there is time for"
        if epochs < min(wanted, MOST_EPOCHS)
        else f"{LEAST_STEPS:,} steps and {LEAST_EPOCHS} epochs at the least, {MOST_EPOCHS:,} epochs at most"
    )
    return Suggestion(size, images, gpus, global_batch, epochs, length)


def suggest_within(images: int, gpus: int, shards: str, gpu: str, hours: float | None) -> tuple[Suggestion, Plan]:
    """A suggestion for a GPU that is known, and what it comes to; the size steps down until the time is enough.

    Raises:
        UsageError: nothing fits the GPU, or the GPU is unknown.
    """
    cluster = build_cluster(find_gpu(gpu), gpus, 8, None)
    first = suggest(images, gpus).size
    for size in reversed(LADDER[: LADDER.index(first) + 1]):
        found = suggest(images, gpus, size)
        plan = make_plan(found.recipe(shards), cluster, Assumptions(images=images, image_bytes=1))
        affordable = math.inf if hours is None else hours * 3600 * plan.chosen.images_per_second / images
        if affordable >= TOO_FEW_EPOCHS or size is LADDER[0]:
            return suggest(images, gpus, size, affordable), plan
    raise AssertionError("the smallest size is always taken")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae recipes suggest", description=__doc__)
    parser.add_argument("shards", help="shard directory or URL, with its index")
    parser.add_argument("--gpus", type=at_least(1), required=True)
    parser.add_argument("--gpu", help=f"to size memory and time for it: {', '.join(GPUS)}")
    parser.add_argument("--hours", type=above_0, help="that the run may take; needs --gpu")
    args = parser.parse_args(argv)
    if args.hours is not None and args.gpu is None:
        raise UsageError(f"--hours {args.hours:g} needs --gpu: how far a run comes in that time depends on it")
    index = open_index(args.shards)
    if args.gpu is None:
        print(suggest(len(index), args.gpus).text(args.shards), end="")
        return 0
    found, plan = suggest_within(len(index), args.gpus, args.shards, args.gpu, args.hours)
    hours = found.epochs * len(index) / plan.chosen.images_per_second / 3600
    pace = f"at an MFU of {plan.speed.mfu:.2f}, {plan.speed.source}"
    print(f"# About {hours:.3g} hours on {args.gpus} x {args.gpu}, {pace}.")
    print(found.text(args.shards, keys(plan)), end="")
    return 0
