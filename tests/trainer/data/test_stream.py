import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import tiny_recipe
from trainer.data.index import open_index
from trainer.data.stream import Order, Position, ToDevice, stream
from trainer.distributed import Ranks
from trainer.errors import UsageError


@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(0, 5), st.integers(1, 50))
@settings(max_examples=50)
def test_every_epoch_visits_every_sample_once(seed: int, num_samples: int, epoch: int, step: int) -> None:
    order = Order(seed, num_samples)
    tickets = list(
        itertools.chain.from_iterable(
            order.tickets(start, min(step, num_samples * (epoch + 1) - start))
            for start in range(num_samples * epoch, num_samples * (epoch + 1), step)
        )
    )
    assert sorted(tickets) == [(epoch, sample) for sample in range(num_samples)]


def test_epochs_and_seeds_differ() -> None:
    orders = [[t.sample for t in Order(seed, 100).tickets(start, 100)] for seed, start in ((0, 0), (0, 100), (1, 0))]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def global_batches(shards: Path, world_size: int, workers: int, start: int, count: int) -> list[list[int]]:
    """Samples of `count` global batches, the ranks' shares one behind the other."""
    recipe = tiny_recipe(**{"data.num_workers": workers, "data.shards": str(shards), "train.global_batch": 16})
    index = open_index(shards)
    batches: list[list[int]] = [[] for _ in range(count)]
    for rank in range(world_size):
        own = stream(recipe, Ranks(rank, world_size), index, Position(0, start, index.fingerprint))
        for number in range(count):
            for _ in range(recipe.accumulation(world_size)):
                batches[number] += next(own).samples
    return batches


def test_global_batches_depend_on_neither_ranks_nor_workers(shards: Path) -> None:
    expected = global_batches(shards, 1, 0, 0, 8)
    for world_size, workers in ((2, 0), (4, 0), (8, 0), (1, 1), (2, 3)):
        assert global_batches(shards, world_size, workers, 0, 8) == expected


def test_a_position_continues_the_sequence(shards: Path) -> None:
    whole = global_batches(shards, 1, 0, 0, 8)  # 128 samples, more than two epochs of 54
    for done in (1, 3, 5):
        assert global_batches(shards, 2, 0, 16 * done, 8 - done) == whole[done:]


def test_pixels_belong_to_seed_epoch_and_sample(shards: Path) -> None:
    index = open_index(shards)
    views = []
    for workers, start in ((0, 0), (2, 0), (0, 8)):
        recipe = tiny_recipe(**{"data.num_workers": workers, "data.shards": str(shards)})
        first = list(itertools.islice(stream(recipe, Ranks(), index, Position(0, start, "")), 8))
        views.append({(s): b.images[i] for b in first for i, s in enumerate(b.samples)})
    assert all(torch.equal(view, views[1][sample]) for sample, view in views[0].items())
    assert all(torch.equal(view, views[0][sample]) for sample, view in views[2].items() if sample in views[0])
    image = next(iter(views[0].values()))
    assert (image.dtype, image.shape) == (torch.uint8, (3, 64, 64))


def test_resuming_on_other_data_or_seed_is_refused(shards: Path) -> None:
    index = open_index(shards)
    with pytest.raises(UsageError, match="seed=1"):
        Position(0, 0, index.fingerprint).require(1, index)
    with pytest.raises(UsageError, match="changed since"):
        Position(0, 0, "other").require(0, index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(shards: Path, tmp_path: Path, workers: int) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    index = open_index(copy)
    with (copy / "000000.tar").open("r+b") as file:
        file.seek(int(index.samples[0]["offset"]))
        file.write(b"\0" * 200)
    recipe = tiny_recipe(**{"data.num_workers": workers, "data.shards": str(copy)})
    with pytest.raises(UsageError, match=r"000000\.tar: 0000000\.jpg"):
        list(itertools.islice(stream(recipe, Ranks(), index, Position(0, 0, index.fingerprint)), 40))


def test_normalisation() -> None:
    recipe = tiny_recipe()
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor(recipe.data.mean), torch.tensor(recipe.data.std)
    expected = (images / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(ToDevice(torch.device("cpu"), recipe.data.mean, recipe.data.std)(images), expected)
