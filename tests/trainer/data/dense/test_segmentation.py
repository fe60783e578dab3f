import colorsys
import io
from collections import Counter
from random import Random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mixmae.trainer.data.dense.label_maps import dump_label_map
from mixmae.trainer.data.dense.photometric import _change_colours, distort
from mixmae.trainer.data.dense.segmentation import SegmentationCrop, _is_mixed
from mixmae.trainer.data.faults import PILLOW
from mixmae.trainer.recipe.sections.data import Data


@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 2**32))
def test_the_shorter_side_is_half_to_twice_the_crop(height: int, width: int, seed: int) -> None:
    labels = np.zeros((height, width), np.uint8)
    view, seen = SegmentationCrop(64, Data()).draw(labels, Random(seed))
    assert seen.shape == (view.rows, view.columns) == tuple(min(64, side) for side in view.resized)
    shorter, longer = sorted(view.resized)
    assert longer <= 513
    assert 32 <= shorter <= 128 or longer >= 128  # of very long images the longer side decides


@given(st.integers(40, 900), st.integers(40, 900), st.integers(0, 2**32))
def test_half_to_twice_a_rectangular_crop_is_covered(height: int, width: int, seed: int) -> None:
    view, seen = SegmentationCrop((64, 128), Data()).draw(np.zeros((height, width), np.uint8), Random(seed))
    assert seen.shape == (min(64, view.resized[0]), min(128, view.resized[1]))
    covers = max(view.resized[0] / 64, view.resized[1] / 128)
    assert max(covers, max(view.resized) / 512) >= 0.49
    assert max(view.resized) <= 2 * 512 + 1
    assert min(view.resized[0] / 64, view.resized[1] / 128) <= 2.01


@given(st.lists(st.sampled_from([0, 1, 2, 255]), min_size=1, max_size=40))
def test_three_quarters_of_one_class_are_too_much(labels: list[int]) -> None:
    counts = Counter(label for label in labels if label != 255)
    expected = len(counts) > 1 and max(counts.values()) / counts.total() < 0.75
    assert _is_mixed(np.array(labels, np.uint8).reshape(1, -1)) == expected


def test_crops_of_several_classes_are_looked_for() -> None:
    """An image of which one crop in about ten shows a second class well: most of ten tries find one."""
    labels = np.zeros((256, 256), np.uint8)
    labels[:60, :60] = 1
    crop, random = SegmentationCrop(64, Data(), scale=(2.0, 2.0)), Random(0)
    first = np.mean([_is_mixed(crop.draw(labels * 0 + np.uint8(i % 2), random)[1]) for i in range(10)])
    share = np.mean([_is_mixed(crop.draw(labels, random)[1]) for _ in range(200)])
    assert first == 0
    single = np.mean([_is_mixed(labels[y : y + 128, x : x + 128]) for y in range(0, 129, 4) for x in range(0, 129, 4)])
    assert single < 0.2
    assert abs(share - (1 - (1 - single) ** 11)) < 0.15


def test_image_and_labels_are_padded_together() -> None:
    pixels = np.zeros((20, 80, 3), np.uint8)
    pixels[:, 40:] = 255
    labels = (pixels[..., 0] // 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    crop = SegmentationCrop(32, Data(), scale=(0.5, 0.5))
    buffers = crop.new_batch(1)
    crop.read_annotated(buffer.getvalue(), dump_label_map(labels), {"state": PILLOW}, Random(1), buffers, 0)
    segmentation, image = buffers.targets["segmentation"][0], buffers.images[0].float().mean(0)
    assert (segmentation[16:] == 255).all()
    assert segmentation[:16].unique().tolist() == [0, 1]
    assert image[:16][segmentation[:16] == 1].min() > image[:16][segmentation[:16] == 0].max()
    colour = torch.tensor([round(255 * value) for value in Data().mean], dtype=torch.uint8)
    assert (buffers.images[0, :, 16:] == colour[:, None, None]).all()


def test_distortion_keeps_grey_grey_and_order() -> None:
    grey = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2)
    results = [distort(grey, Random(seed)).astype(int) for seed in range(60)]
    assert all((found[..., :1] == found).all() for found in results)
    assert all((np.diff(found[..., 0].ravel()) >= 0).all() for found in results)
    means = np.array([found.mean() for found in results])
    assert len(np.unique(means)) > 30
    assert 50 < means.min() < 100
    assert 150 < means.max() < 230


@given(st.floats(0.5, 1.5), st.floats(-0.1, 0.1), st.integers(0, 2**32))
def test_saturation_and_hue_are_those_of_colorsys(saturation: float, hue: float, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    found = _change_colours(pixels, saturation, hue)
    for before, after in zip(pixels.reshape(-1, 3), found.reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(before / 255))
        expected = np.array(colorsys.hsv_to_rgb((h + hue) % 1, min(1, s * saturation), v)) * 255
        assert np.abs(expected - after).max() < 16  # a step of a hue of 8 bits is 6 levels, and it is rounded twice
