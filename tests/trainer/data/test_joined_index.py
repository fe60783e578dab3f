import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixmae.base.errors import UsageError
from mixmae.trainer.data.faults import Reason
from mixmae.trainer.data.index import INVALID_LABEL, ShardIndex
from mixmae.trainer.data.integrity import require_annotations, require_usable
from mixmae.trainer.data.joined_index import describe_shares
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.indexing import write_index
from mixmae.trainer.data.shards.scenes import Scenes
from mixmae.trainer.data.shards.synthetic import Synthetic
from mixmae.trainer.data.stream import Position, Stream
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.data import Data
from tests.helpers import coloured_shards, tiny_recipe


@pytest.fixture(scope="module")
def places(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """54 images of shapes, and 24 of colours."""
    return shards, coloured_shards(tmp_path_factory.mktemp("places") / "colours")


def recipe_for(places: tuple[Path, Path], weights: tuple[float, float] | None = (1, 1), **changes: Any) -> Recipe:
    entries: list[Any] = [str(place) for place in places]
    if weights is not None:
        entries = [{"shards": place, "weight": weight} for place, weight in zip(entries, weights, strict=True)]
    return tiny_recipe(
        **{
            "data.shards": entries,
            "data.streams": 8,
            "train.global_batch": 16,
            "train.micro_batch": 2,
            "data.shuffle_window": 8,
        }
        | changes
    )


def global_batches(recipe: Recipe, world_size: int, start: int, count: int) -> list[list[tuple[int, int]]]:
    """Samples of the global batches from a position on, with the hashes of their pixels."""
    batches: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for rank in range(world_size):
        index = open_index(recipe.data.shards)
        with Stream(recipe, Ranks(rank, world_size), index, Position(0, start, index.fingerprint)) as own:
            for number in range(count):
                for _ in range(recipe.accumulation(world_size)):
                    batch = next(own)
                    assert not batch.faults
                    pixels = [xxhash.xxh3_64_intdigest(image.numpy().tobytes()) for image in batch.images]
                    batches[number] += zip(batch.samples, pixels, strict=True)
    return batches


@given(st.data())
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_weighted_run_goes_on_anywhere_with_other_ranks(places: tuple[Path, Path], data: st.DataObject) -> None:
    weights = data.draw(st.sampled_from([None, (1, 1), (0.3, 5), (7, 0.1)]), "weights")
    recipe = recipe_for(places, weights)
    expected = global_batches(recipe, 1, 0, 8)
    found: list[list[tuple[int, int]]] = []
    while len(found) < 8:
        count = data.draw(st.integers(1, 8 - len(found)), "steps")
        found += global_batches(recipe, data.draw(st.sampled_from([1, 2, 4, 8]), "ranks"), 16 * len(found), count)
    assert found == expected


def test_workers_change_nothing(places: tuple[Path, Path]) -> None:
    recipe = recipe_for(places)
    assert global_batches(recipe_for(places, (1, 1), **{"data.num_workers": 2}), 1, 0, 6) == global_batches(
        recipe, 1, 0, 6
    )


def test_shares_and_repeats_are_as_stated(places: tuple[Path, Path]) -> None:
    index = open_index(recipe_for(places, (1, 3)).data.shards)
    assert len(index) == 54 + 24
    assert [quota.samples for quota in index.quotas] == [20, 58]
    assert describe_shares(index) == [
        f"{places[0]}: 25.6% of an epoch, 54 images, each 0.37 times",
        f"{places[1]}: 74.4% of an epoch, 24 images, each 2.42 times",
    ]
    seen = list(itertools.chain.from_iterable(global_batches(recipe_for(places, (1, 3)), 1, 0, 39)))  # 8 epochs
    counts = Counter(sample for sample, _ in seen)
    assert sum(count for sample, count in counts.items() if sample < 54) == 8 * 20
    # Each time that an image comes, it is cropped anew.
    assert max(Counter(seen).values()) == 1


def test_without_weights_every_image_is_seen_once(places: tuple[Path, Path]) -> None:
    seen = list(itertools.chain.from_iterable(global_batches(recipe_for(places, None), 1, 0, 39)))
    assert set(Counter(sample for sample, _ in seen).values()) == {8}


def test_the_fingerprint_covers_places_and_weights(places: tuple[Path, Path], tmp_path: Path) -> None:
    def fingerprint(*entries: Any) -> str:
        return open_index(Data(shards=entries).shards).fingerprint

    one, two = map(str, places)
    assert fingerprint(one) == open_index(one).fingerprint
    weighted = [{"shards": one, "weight": 1}, {"shards": two, "weight": 1}]
    different = [fingerprint(one), fingerprint(one, two), fingerprint(two, one), fingerprint(*weighted)]
    assert len(set(different)) == 4
    assert fingerprint(*({**entry, "weight": 5} for entry in weighted)) == fingerprint(*weighted)
    before, now = (open_index(Data(shards=entries).shards) for entries in ((one, two), weighted))
    assert now.first_difference(before.listing()) == "an epoch took [54, 24] images of its places then, [39, 39] now"
    shutil.copytree(two, tmp_path / "moved")
    assert fingerprint(one, str(tmp_path / "moved")) == fingerprint(one, two)


def test_images_labels_and_names_are_those_of_the_places(places: tuple[Path, Path]) -> None:
    one, two = map(open_index, places)
    index = open_index(Data(shards=tuple(map(str, places))).shards)
    assert index.classes == (*one.classes, "blue", "red")
    for sample, (own, number) in {3: (one, 3), 54: (two, 0), 77: (two, 23)}.items():
        assert index.read(sample) == own.read(number)
        assert index.classes[index.samples[sample]["label"]] == own.classes[own.samples[number]["label"]]
        assert index.name_of(sample) == f"{own.store.location}/{own.name_of(number)}"
    assert require_usable(index, 0.0) is None


def test_what_is_cut_in_one_place_is_named(places: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(places[1], tmp_path / "cut")
    with (tmp_path / "cut" / "0.tar").open("r+b") as tar:
        tar.truncate(20_000)
    index = open_index(Data(shards=(str(places[0]), str(tmp_path / "cut"))).shards)
    with pytest.raises(UsageError, match=f"{tmp_path}/cut/0.tar \\(20000 bytes"):
        require_usable(index, 0.0)


def test_numbers_do_not_become_names(places: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(places[1], tmp_path / "numbers")
    content = json.loads((tmp_path / "numbers" / "index.json").read_text())
    assert content["classes"] == ["blue", "red"]
    (tmp_path / "numbers" / "index.json").unlink()
    for tar in (tmp_path / "numbers").glob("*.tar"):
        tar.write_bytes(tar.read_bytes().replace(b"red", b"0\n\n").replace(b"blue", b"1\n\n\n"))
    assert write_index(tmp_path / "numbers").classes == ()
    index = open_index(Data(shards=(str(places[0]), str(tmp_path / "numbers"))).shards)
    assert set(index.samples["label"][54:]) == {INVALID_LABEL}


def test_annotations_are_joined_and_missing_ones_named(places: tuple[Path, Path], tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        build_shards(Scenes(6, 64, seed, "segments"), tmp_path / name, 10**6, 0, 1)
    a, b, plain = str(tmp_path / "a"), str(tmp_path / "b"), str(places[1])
    index = open_index(Data(shards=(a, b)).shards)
    require_annotations(index, "segments", "segmentation")
    assert index.read_annotation(7) == open_index(b).read_annotation(1)
    mixed = open_index(Data(shards=(a, plain)).shards)
    assert mixed.annotation_table is not None
    assert set(mixed.annotation_table["state"][6:]) == {Reason.MISSING_ANNOTATION}
    with pytest.raises(UsageError, match=r"24 of 30 .* cannot be used"):
        require_annotations(mixed, "segments", "segmentation")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards."""
    out = tmp_path_factory.mktemp("many") / "shards"
    index = build_shards(Synthetic(40, 32, 0), out, 20_480, 0, 1).index
    assert len(index.shards) >= 5
    return out


def test_braces_name_shards_of_a_directory(many: Path) -> None:
    whole = open_index(many)
    last = len(whole.shards) - 1
    assert open_index(f"{many}/{{000000..{last:06d}}}.tar").fingerprint == whole.fingerprint
    part = open_index(f"{many}/{{000003,000001}}.tar")
    assert [shard.name for shard in part.shards] == ["000001.tar", "000003.tar"]
    chosen = np.flatnonzero(np.isin(whole.samples["shard"], [1, 3]))
    assert [part.read(n) for n in range(len(part))] == [whole.read(int(n)) for n in chosen]
    assert open_index(f"{many}/{{000001,000003}}.tar").fingerprint == part.fingerprint != whole.fingerprint
    assert open_index(many / "000001.tar").shards == whole.shards[1:2]


def test_braces_name_directories(many: Path, places: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(many)
    (tmp_path / "b").symlink_to(places[1])
    both = open_index(f"{tmp_path}/{{a,b}}")
    assert both.fingerprint == open_index(Data(shards=(str(many), str(places[1]))).shards).fingerprint
    (tmp_path / "{c,d}").symlink_to(many)
    assert open_index(f"{tmp_path}/{{c,d}}").fingerprint == open_index(many).fingerprint


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["{many}/{{000000..000900}}.tar"], "its index lists no .*, but .* 000000.tar to "),
        (["{many}/{{000000..000001.tar"], "its braces do not match"),
        (["{many}", "{many}"], "twice; name it once"),
        (["{many}", "{many}-elsewhere"], "does not exist"),
    ],
)
def test_what_cannot_be_opened_is_one_line(entries: list[str], message: str, many: Path) -> None:
    with pytest.raises(UsageError, match=message):
        open_index(Data(shards=tuple(entry.format(many=many) for entry in entries)).shards)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "expected at least one directory"),
        ([{"shards": "a", "weight": 1}, "b"], "b has no weight and others have"),
        ([{"shards": "a", "weight": 0}], "weight.* expected .*greater than 0"),
        ([{"at": "a"}], "unknown key"),
        (5, "data.shards"),
    ],
)
def test_wrong_lists_are_explained(value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        tiny_recipe(**{"data.shards": value})
    assert "\n" not in str(caught.value)


def test_a_list_survives_being_written(places: tuple[Path, Path]) -> None:
    recipe = recipe_for(places, (1, 2))
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe
    entry: ShardIndex = open_index(recipe.data.shards)
    assert len(entry.quotas) == 2
