import io

import numpy as np
from PIL import Image

from mixmae.trainer.data.shards import synthetic
from mixmae.trainer.data.shards.synthetic import Synthetic


def test_images_are_a_function_of_seed_and_number() -> None:
    one, longer, other = Synthetic(20, 48, 0), Synthetic(40, 48, 0), Synthetic(20, 48, 1)
    assert all(one.read(a) == longer.read(b) for a, b in zip(one.entries, longer.entries, strict=False))
    assert all(one.read(entry) != other.read(entry) for entry in one.entries)


def test_classes_come_in_turn_and_pictures_are_jpegs() -> None:
    source = Synthetic(20, 48, 0)
    images = [Image.open(io.BytesIO(source.read(entry)[1])) for entry in source.entries]
    assert [entry.label for entry in source.entries] == [n % len(synthetic.CLASSES) for n in range(20)]
    assert {image.format for image in images} == {"JPEG"}
    assert {image.size for image in images} == {(48, 48)}


def test_expected_sizes_are_near() -> None:
    for size in (48, 96, 224):
        source = Synthetic(18, size, 0)
        drawn = sum(len(source.read(entry)[1]) for entry in source.entries)
        assert 0.8 < sum(entry.size for entry in source.entries) / drawn < 1.25


def test_colour_does_not_tell_the_class() -> None:
    """The mean colours of the classes lie as close together as those of random halves do."""
    random = np.random.default_rng(0)
    means = np.array(
        [
            [np.asarray(synthetic.draw(label, 32, random)).mean((0, 1)) for _ in range(40)]
            for label in range(len(synthetic.CLASSES))
        ]
    )
    between = means.mean(1).std(0)
    expected = means.std(1).mean(0) / np.sqrt(40)
    assert (between < 2 * expected).all()
