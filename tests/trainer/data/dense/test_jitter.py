import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixmae.trainer.data.decode import upright_size
from mixmae.trainer.data.dense.jitter import LargeScaleJitterCrop
from mixmae.trainer.data.dense.objects import dump_objects, parse_objects
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.rng import Purpose, random_at
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.scenes import Scenes
from mixmae.trainer.data.stream import Position, Stream
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.sections.data import Data
from tests.helpers import tiny_recipe


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 scenes of up to 64 px; the fourth one has no objects."""
    out = tmp_path_factory.mktemp("scenes") / "shards"
    build_shards(Scenes(48, 64, 0, "objects"), out, 60_000, 0, 1)
    return out


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32))
def test_the_image_fits_into_a_tenth_to_twice_the_square(height: int, width: int, seed: int) -> None:
    view = LargeScaleJitterCrop(1024, Data()).draw(height, width, Random(seed))
    longer = max(view.resized)
    assert 102 <= longer <= 2048
    assert abs(view.resized[0] * width - view.resized[1] * height) <= 0.5 * (height + width) or min(view.resized) == 1
    for start, count, resized in zip((view.top, view.left), (view.rows, view.columns), view.resized, strict=True):
        assert count == min(1024, resized)
        assert 0 <= start <= resized - count


def test_a_window_may_be_a_rectangle() -> None:
    crop = LargeScaleJitterCrop((64, 128), Data(hflip=0), scale=(1.0, 1.0))
    view = crop.draw(64, 96, Random(0))
    assert view.resized == (64, 96)
    square = {"category": 0, "bbox": [8, 8, 40, 40], "segmentation": [[8, 8, 48, 8, 48, 48, 8, 48]]}
    found = crop.targets(parse_objects(dump_objects([square]), 64, 96), view)
    assert found["masks"].shape == (1, 64, 16)
    mask = np.unpackbits(found["masks"][0], axis=1)
    assert mask[8:48, 8:48].all()
    assert mask.sum() == 1600
    assert crop.new_batch(2).images.shape == (2, 3, 64, 128)


def test_scales_windows_and_flips_are_uniform() -> None:
    crop, random = LargeScaleJitterCrop(1024, Data()), Random(0)
    views = [crop.draw(480, 640, random) for _ in range(4000)]
    scales = np.array([view.resized[1] for view in views]) / 1024
    assert np.allclose(np.quantile(scales, [0, 0.25, 0.5, 0.75, 1]), [0.1, 0.575, 1.05, 1.525, 2.0], atol=0.05)
    places = np.array([view.left / (view.resized[1] - 1024) for view in views if view.resized[1] > 1124])
    assert np.allclose(np.quantile(places, [0, 0.5, 1]), [0, 0.5, 1], atol=0.05)
    assert 0.47 < np.mean([view.mirrored for view in views]) < 0.53


def targets_of(items: list[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Of an image of 32 x 48 px in an unscaled view."""
    crop = LargeScaleJitterCrop(48, Data(hflip=0), scale=(1.0, 1.0))
    return crop.targets(parse_objects(dump_objects(items), 32, 48), crop.draw(32, 48, Random(seed)))


def test_crowds_are_left_out_and_boxes_are_those_of_masks() -> None:
    square = [[4, 4, 20, 4, 20, 20, 4, 20]]
    one: dict[str, Any] = {"category": 3, "bbox": [0, 0, 30, 30], "segmentation": square, "iscrowd": 0}
    crowd = {"category": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1, "segmentation": {"size": [32, 48], "counts": [0, 1536]}}
    found = targets_of([crowd, one, crowd])
    assert found["classes"].tolist() == [3]
    assert found["boxes"].tolist() == [[4, 4, 20, 20]]
    assert np.unpackbits(found["masks"][0], axis=1).sum() == 256
    nothing = targets_of([])
    assert [nothing[name].shape for name in ("boxes", "classes", "masks")] == [(0, 4), (0,), (0, 48, 6)]
    assert [nothing[name].dtype for name in ("boxes", "classes", "masks")] == [np.float32, np.int64, np.uint8]


def test_batches_hold_all_objects_one_behind_the_other(scenes: Path) -> None:
    """As many of each image as it has, the same from a worker process as in this one, and as sample by sample."""
    index, size = open_index(scenes), 32
    assert b"[]" in [index.read_annotation(sample) for sample in range(len(index))]
    crop = LargeScaleJitterCrop(size, Data())
    changes = {"data.shards": str(scenes), "train.global_batch": 16, "train.micro_batch": 8}
    batches = []
    for workers in (0, 1):
        recipe = tiny_recipe(**{**changes, "data.num_workers": workers})
        with Stream(recipe, Ranks(), open_index(scenes), Position(0, 0, ""), transform=crop) as stream:
            batches.append([next(stream) for _ in range(6)])
    for here, there in zip(*batches, strict=True):
        assert here.samples == there.samples
        assert here.bytes_read == there.bytes_read > int(index.samples["size"][here.samples].sum())
        assert torch.equal(here.images, there.images)
        assert sorted(here.targets) == sorted(there.targets) == ["boxes", "classes", "counts", "masks"]
        assert all(torch.equal(here.targets[name], there.targets[name]) for name in here.targets)
        ends = here.targets["counts"].cumsum(0).tolist()
        assert ends[-1] == len(here.targets["boxes"]) == len(here.targets["classes"]) == len(here.targets["masks"])
        for sample, start, end in zip(here.samples, [0, *ends], ends, strict=False):
            size_of = upright_size(index.read(sample))
            view = crop.draw(*size_of, random_at(Purpose.AUGMENTATION, recipe.seed, 0, sample))
            alone = crop.targets(parse_objects(index.read_annotation(sample), *size_of), view)
            for name, part in alone.items():
                assert np.array_equal(here.targets[name][start:end].numpy(), part)


def test_padding_has_the_mean_colour(scenes: Path) -> None:
    index, settings = open_index(scenes), Data()
    crop = LargeScaleJitterCrop(64, settings, scale=(0.5, 0.5))
    buffers = crop.new_batch(1)
    crop.read_annotated(index.read(0), index.read_annotation(0), index.samples[0], Random(0), buffers, 0)
    colour = torch.tensor([round(255 * value) for value in settings.mean], dtype=torch.uint8)
    assert (buffers.images[0, :, 32:] == colour[:, None, None]).all()
    assert (buffers.images[0, :, :, 32:] == colour[:, None, None]).all()
    assert json.loads(index.read_annotation(0))
