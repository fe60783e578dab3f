import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import center_crop as their_center_crop
from torchvision.transforms.functional import resized_crop

from trainer.config import Data
from trainer.data.decode import UnreadableImageError, center_crop, evaluation_view, random_crop, training_view


@pytest.fixture
def photo() -> Image.Image:
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (9, 13, 3), dtype=np.uint8))
    return small.resize((130, 90), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32))
def test_crops_lie_inside_the_image(width: int, height: int, seed: int) -> None:
    left, upper, right, lower = random_crop(width, height, (0.2, 1.0), np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height


def test_crops_are_distributed_like_torchvisions() -> None:
    random = np.random.default_rng(0)
    ours = np.array([random_crop(500, 375, (0.2, 1.0), random) for _ in range(4000)])
    ours = np.stack([ours[:, 2] - ours[:, 0], ours[:, 3] - ours[:, 1], ours[:, 0], ours[:, 1]], axis=1)
    image = Image.new("RGB", (500, 375))
    draws = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    theirs = np.array([(w, h, left, top) for top, left, h, w in draws])
    for mine, other in zip(ours.T, theirs.T, strict=True):
        spread = other.std() / np.sqrt(len(other))
        assert abs(mine.mean() - other.mean()) < 6 * spread
        assert np.abs(np.quantile(mine, (0.1, 0.5, 0.9)) - np.quantile(other, (0.1, 0.5, 0.9))).max() < 15


def test_views_are_torchvisions_resized_crops(photo: Image.Image) -> None:
    settings = Data(hflip=0.0)
    view = training_view(encoded(photo), 32, settings, np.random.default_rng(5))
    left, upper, right, lower = random_crop(*photo.size, settings.crop_scale, np.random.default_rng(5))
    expected = resized_crop(
        photo, int(upper), int(left), int(lower - upper), int(right - left), [32, 32], interpolation=3
    )
    # Ours resizes from the box, theirs from a cut-out: only pixels at the crop's edge see different neighbours.
    difference = np.abs(view.astype(int) - np.asarray(expected).transpose(2, 0, 1))
    assert difference[:, 3:-3, 3:-3].max() <= 1


def test_flips(photo: Image.Image) -> None:
    views = [training_view(encoded(photo), 32, Data(hflip=p), np.random.default_rng(1)) for p in (0.0, 1.0)]
    assert np.array_equal(views[0], views[1][:, :, ::-1])


def test_evaluation_sees_the_middle(photo: Image.Image) -> None:
    expected = their_center_crop(photo, [90, 90])
    assert np.array_equal(evaluation_view(encoded(photo), 90), np.asarray(expected).transpose(2, 0, 1))
    assert center_crop(90, 130) == (0, 20, 90, 110)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_other_colour_modes_become_rgb(photo: Image.Image, mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert evaluation_view(encoded(photo.convert(mode), kind), 16).shape == (3, 16, 16)


@pytest.mark.parametrize("content", [b"", b"GIF", b"\xff\xd8\xff" + b"\0" * 50])
def test_what_is_not_an_image(content: bytes) -> None:
    with pytest.raises(UnreadableImageError):
        evaluation_view(content, 16)


def test_cut_images_are_damaged(photo: Image.Image) -> None:
    whole = encoded(photo, "JPEG")
    with pytest.raises(UnreadableImageError):
        evaluation_view(whole[: len(whole) // 2], 16)
