import io

import numpy as np
from PIL import Image

from trainer.data import synthetic


def test_images_are_a_function_of_seed_and_number() -> None:
    one, two, other = (list(synthetic.samples(20, 48, seed, jobs)) for seed, jobs in ((0, 1), (0, 2), (1, 1)))
    assert one == two
    assert all(a.content != b.content for a, b in zip(one, other, strict=True))


def test_classes_come_in_turn_and_pictures_are_jpegs() -> None:
    samples = list(synthetic.samples(20, 48, 0))
    assert [s.label for s in samples] == [n % len(synthetic.CLASSES) for n in range(20)]
    assert {Image.open(io.BytesIO(s.content)).format for s in samples} == {"JPEG"}
    assert {Image.open(io.BytesIO(s.content)).size for s in samples} == {(48, 48)}


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
