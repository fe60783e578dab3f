from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mixmae.trainer.data.decode import center_resized_crop, random_resized_crop
from mixmae.trainer.data.faults import ARRAY, UnusableError
from mixmae.trainer.data.nodata import find_valid, resize_valid
from mixmae.trainer.recipe.sections.data import Data
from tests.trainer.data.test_arrays import data, npy


def reached(length: int, resized: int) -> np.ndarray:
    """[resized, length]: whether torch's filter weighs a pixel, by a resize of each unit vector."""
    eye = torch.eye(length)[None, None]
    weights = torch.ops.aten._upsample_bicubic2d_aa(eye, [resized, length], False)[0, 0]
    return weights.numpy() != 0


@given(
    arrays(np.bool_, (9, 12), elements=st.sampled_from([True] * 9 + [False])), st.integers(3, 20), st.integers(3, 20)
)
def test_a_pixel_counts_where_nothing_that_it_is_made_of_is_missing(valid: np.ndarray, height: int, width: int) -> None:
    touched = reached(9, height) @ ~valid @ reached(12, width).T
    found = resize_valid(valid, height, width)
    assert not (found & touched).any()
    near = resize_valid(np.pad(valid, 1, constant_values=True), height + 2, width + 2)
    assert near.shape == (height + 2, width + 2)
    if valid.all():
        assert found.all()


def test_pixels_far_from_what_is_missing_count() -> None:
    valid = np.ones((64, 64), np.bool_)
    valid[20:24, 40:44] = False
    found = resize_valid(valid, 32, 32)
    assert not found[10:12, 20:22].any()
    assert (~found).sum() <= 8 * 8
    assert np.array_equal(resize_valid(valid, 64, 64), valid)


@pytest.mark.parametrize(("dtype", "nodata"), [("uint16", 0), ("float32", -9999.0), ("float32", "nan")])
def test_a_crop_says_where_it_holds_nothing_and_shows_the_mean_there(dtype: str, nodata: float | str) -> None:
    settings = data(2, dtype, nodata=nodata, mean=[0.25, 0.5])
    values = np.full((40, 40, 2), 100).astype(dtype)
    values[:10, :, 1] = float(nodata)  # of one band alone
    content = npy(values)
    for seed in range(6):
        valid = torch.zeros(32, 32, dtype=torch.bool)
        found = random_resized_crop(content, ARRAY, 32, settings, Random(seed), valid=valid)
        kept = found.permute(1, 2, 0)[valid].float()
        assert (kept - 100).abs().max() < 1e-3
    valid = torch.zeros(40, 40, dtype=torch.bool)
    whole = center_resized_crop(content, ARRAY, 40, pixels=settings.pixels, valid=valid)
    assert not valid[:10].any()
    assert valid[10:].all()
    scale = settings.pixels.scale
    for channel, mean in enumerate((0.25, 0.5)):
        assert (whole[channel, :10].float() - mean * scale).abs().max() <= (0.5 if dtype == "uint16" else 0)


def test_flips_are_those_of_the_image() -> None:
    values = np.arange(1, 401, dtype=np.uint16).reshape(20, 20)
    values[3, 2] = 0
    for hflip in (0.0, 1.0):
        valid = torch.zeros(20, 20, dtype=torch.bool)
        settings = data(1, "uint16", nodata=0, hflip=hflip, crop_scale=[1.0, 1.0], mean=[0.0])
        image = random_resized_crop(npy(values), ARRAY, 20, settings, Random(0), valid=valid)
        assert torch.equal(~valid, image[0].int() == 0)
        assert not valid[3, 17 if hflip else 2]


def test_values_that_are_not_finite_are_refused_where_they_are_not_left_out() -> None:
    values = np.ones((8, 8), np.float32)
    values[0, 0] = np.nan
    with pytest.raises(UnusableError, match="not finite"):
        center_resized_crop(npy(values), ARRAY, 8, pixels=data(1, "float32").pixels)
    assert np.array_equal(find_valid(values[..., None], float("nan")), ~np.isnan(values))


def test_rgb_images_are_the_same_with_a_value_that_none_has() -> None:
    values = np.random.default_rng(0).integers(1, 255, (50, 60, 3), np.uint8)
    one, other = (random_resized_crop(npy(values), ARRAY, 32, Data(nodata=nodata), Random(0)) for nodata in (None, 0))
    assert torch.equal(one, other)
