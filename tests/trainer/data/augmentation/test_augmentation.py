"""RandAugment and random erasing beside timm's: the same pixels, the same amounts, drawn as often."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing as TimmErasing

from mixmae.base.errors import UsageError
from mixmae.trainer.data.augmentation.erasing import RandomErasing
from mixmae.trainer.data.augmentation.labelled import LabelledCrop
from mixmae.trainer.data.augmentation.rand_augment import INCREASING, OPERATIONS, RandAugment
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.recipe.sections.data import Data

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = (124, 116, 104)
PHOTO = Image.fromarray(data.astronaut()[:300, 100:400]).resize((96, 96))


def timms(name: str, increasing: bool) -> str:
    return f"{name}Increasing" if increasing and f"{name}Increasing" in auto_augment.NAME_TO_OP else name


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_give_timms_pixels(monkeypatch: pytest.MonkeyPatch, name: str, increasing: bool) -> None:
    operation = (INCREASING if increasing else OPERATIONS)[name]
    for magnitude in (0.0, 3.3, 9.0, 10.0):
        for sign in (1, -1) if operation.signed else (1,):
            monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
            hparams = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
            if name == "Posterize" and operation.amount(sign * magnitude / 10) < 1:
                black = operation.apply(PHOTO, 0, FILL)  # which timm gets an error for from recent Pillows
                assert not np.asarray(black).any()
                continue
            theirs = auto_augment.AugmentOp(timms(name, increasing), 1.0, magnitude, hparams)(PHOTO)
            own = operation.apply(PHOTO, operation.amount(sign * magnitude / 10), FILL)
            assert np.array_equal(np.asarray(own), np.asarray(theirs)), (magnitude, sign)


def recorder(amounts: list[float]) -> Callable[..., Image.Image]:
    """An operation that notes its amount, 0 where it has none, and changes nothing."""

    def record(image: Image.Image, *args: Any, **_: Any) -> Image.Image:
        amounts.append(args[0] if args else 0.0)
        return image

    return record


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.8", "rand-m15-mmax20-mstd101-inc0"])
def test_notation_and_draws_are_timms(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """How often each operation comes, and how its amounts are distributed."""
    own = RandAugment.parse(text, MEAN)
    theirs = auto_augment.rand_augment_transform(text, {"img_mean": FILL, "translate_const": 43})
    assert own.fill == FILL
    drawn: dict[str, list[float]] = {name: [] for name in OPERATIONS}
    table = INCREASING if own.increasing else OPERATIONS
    for name in table:
        monkeypatch.setitem(table, name, table[name]._replace(apply=recorder(drawn[name])))
    expected: dict[str, list[float]] = {name: [] for name in OPERATIONS}
    for operation in theirs.ops:
        operation.aug_fn = recorder(expected[operation.name.removesuffix("Increasing")])
    random = Random(0)
    np.random.seed(0)
    auto_augment.random.seed(0)
    for _ in range(4000):
        own(PHOTO, random)
        theirs(PHOTO)
    for name in OPERATIONS:
        ours, other = np.array(drawn[name], float), np.array(expected[name], float)
        assert len(ours) == pytest.approx(len(other), abs=5 * math.sqrt(len(other))), name
        if name not in ("AutoContrast", "Equalize", "Invert"):
            at = np.union1d(ours, other)  # Kolmogorov and Smirnov's statistic
            shares = [np.searchsorted(np.sort(amounts), at, side="right") / len(amounts) for amounts in (ours, other)]
            assert np.abs(shares[0] - shares[1]).max() < 1.95 * math.sqrt(1 / len(ours) + 1 / len(other)), name


@pytest.mark.parametrize("text", ["rand-m9-x1", "augmix-m3", "rand-m9-m8", "rand-tweights", "9"])
def test_other_notation_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected rand and parts"):
        RandAugment.parse(text, MEAN)


def test_boxes_are_erased_as_timm_does() -> None:
    """How often, how much, where, and with what; the noise within the range of pixels."""
    erase = RandomErasing(0.5, MEAN, STD)
    theirs = TimmErasing(0.5, mode="pixel", device="cpu")
    mean, std = (torch.tensor(value)[:, None, None] for value in (MEAN, STD))
    shares: list[list[float]] = [[], []]
    values: list[list[torch.Tensor]] = [[], []]
    auto_augment.random.seed(0)
    torch.manual_seed(0)
    random = Random(0)
    for _ in range(500):
        pixels = np.full((48, 64, 3), 7, np.uint8)
        erase(pixels, random)
        own = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
        blank = (torch.full((3, 48, 64), 7 / 255) - mean) / std
        other = theirs(blank.clone())
        for kind, image in enumerate((own, (((other * std + mean) * 255).round().clip(0, 255) / 255 - mean) / std)):
            changed = ((image - blank).abs() > 1e-4).any(0)
            shares[kind].append(float(changed.float().mean()))
            values[kind].append(image[:, changed].flatten())
    ours, expected = np.array(shares)
    assert (ours > 0).mean() == pytest.approx((expected > 0).mean(), abs=0.1)
    assert ours[ours > 0].mean() == pytest.approx(expected[expected > 0].mean(), abs=0.03)
    noise, other_noise = torch.cat(values[0]), torch.cat(values[1])
    assert float(noise.mean() - other_noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.std() / other_noise.std()) == pytest.approx(1, abs=0.01)
    assert 0.95 < float(other_noise.std()) < 1  # what 8 bits take from timm's noise


def test_a_sample_is_a_function_of_its_generator(shards: Path) -> None:
    index = open_index(shards)
    transform = LabelledCrop(
        64, Data(), torch.arange(18), RandAugment.parse("rand-m9-mstd0.5-inc1", MEAN), RandomErasing(0.25, MEAN, STD)
    )
    plain = LabelledCrop(64, Data(), torch.arange(18))
    counts: Counter[bool] = Counter()
    batches = [transform.new_batch(12), transform.new_batch(12), plain.new_batch(12)]
    for batch, made_by in zip(batches, (transform, transform, plain), strict=True):
        for i in range(12):
            made_by.read(index.read(i), index.samples[i], Random(i), batch, i)
    assert torch.equal(batches[0].images, batches[1].images)
    assert batches[0].targets["label"].tolist() == index.samples["label"][:12].tolist()
    for i in range(12):
        counts[torch.equal(batches[0].images[i], batches[2].images[i])] += 1
    assert counts[False] > 3  # a quarter stays as it is: no operation, no box
