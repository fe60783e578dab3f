"""Held-out images with their annotations, each once, split evenly among the ranks."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixmae.trainer.data.decode import open_encoded, upright_size_of
from mixmae.trainer.data.dense.label_maps import LabelMap, parse_label_map
from mixmae.trainer.data.dense.objects import Objects, parse_objects
from mixmae.trainer.data.dense.view import View
from mixmae.trainer.data.faults import UnusableError
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.engine.distributed import Ranks

Fit = Callable[[int, int], tuple[int, int]]
"""Height and width of an image to those that it is resized to."""


class Scene(NamedTuple):
    """A held-out image."""

    sample: int
    """Its index number."""
    image: Tensor
    """uint8 [3, h, w], resized."""
    original_size: tuple[int, int]
    """Height and width of the upright image, in whose pixels the annotation is."""
    annotation: Objects | LabelMap
    counts: bool
    """False where it only fills up the last step, so that all ranks take as many; it was shown before."""


def held_out_scenes(
    index: ShardIndex,
    ranks: Ranks,
    fit: Fit,
    beat: Callable[[], None] = lambda: None,
    threads: int = 1,
) -> Iterator[Scene]:
    """This rank's images, one at a time. Every image counts once: rank r of W has images r, r + W, ... in this order.

    Args:
        index: with annotations.
        fit: to which height and width an image is resized.
        beat: called with each image, so that the rank is not taken for stuck.
        threads: that decode; as many images are decoded ahead.

    Raises:
        UsageError: an image or its annotation cannot be read.
    """
    own = range(ranks.rank, len(index), ranks.world_size)
    steps = len(range(0, len(index), ranks.world_size))
    ahead: deque[Future[Scene]] = deque()
    with ThreadPoolExecutor(max(1, threads), "decode") as pool:
        for step in range(steps):
            counts = step < len(own)
            sample = own[step] if counts else own[0] if own else 0
            # Read here, one after the other: a store belongs to one thread.
            encoded = _read(index, sample)
            ahead.append(pool.submit(_scene, index, sample, *encoded, fit, counts))
            if len(ahead) > max(1, threads):
                beat()
                yield ahead.popleft().result()
        while ahead:
            beat()
            yield ahead.popleft().result()


def _read(index: ShardIndex, sample: int) -> tuple[bytes, bytes]:
    try:
        return index.read(sample), index.read_annotation(sample)
    except UnusableError as error:
        raise index.refusal(sample, error) from error


def _scene(
    index: ShardIndex,
    sample: int,
    content: bytes,
    annotation: bytes,
    fit: Fit,
    counts: bool,
) -> Scene:
    try:
        source = open_encoded(content, int(index.samples[sample]["state"]))
        height, width = upright_size_of(source)
        resized = fit(height, width)
        pixels = View(height, width, resized, 0, 0, *resized).pixels(source)
        parse = parse_objects if index.annotations == "objects" else parse_label_map
        found = parse(annotation, height, width)
    except UnusableError as error:
        raise index.refusal(sample, error) from error
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    return Scene(sample, image, (height, width), found, counts)
