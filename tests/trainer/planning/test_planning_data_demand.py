import json
from pathlib import Path

import pytest

from mixmae.base.errors import UsageError
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.planning.data_demand import IMAGENET_BYTES, IMAGENET_IMAGES, corpus, loading, worker_rate
from tests.helpers import tiny_recipe


def test_shards_tell_their_images_and_bytes(shards: Path) -> None:
    found, index = corpus(tiny_recipe(**{"data.shards": str(shards)}), None, None), open_index(shards)
    assert (found.images, found.source) == (len(index), str(shards))
    assert found.mean_bytes == sum(len(index.read(n)) for n in range(len(index))) / len(index)


def test_what_is_given_comes_first(shards: Path) -> None:
    found = corpus(tiny_recipe(**{"data.shards": str(shards)}), 1000, 500)
    assert (found.images, found.mean_bytes) == (1000, 500)


def test_without_shards_it_is_imagenet(tmp_path: Path) -> None:
    recipe = tiny_recipe(**{"data.shards": str(tmp_path / "none")})
    found = corpus(recipe, None, None)
    assert (found.images, found.mean_bytes, found.source) == (IMAGENET_IMAGES, IMAGENET_BYTES, "ImageNet-1K")
    assert corpus(recipe, 10, None).source == "--images, else ImageNet-1K"
    assert corpus(recipe, 10, 20).source == "--images and --image-bytes"


def test_a_directory_without_an_index_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no index.json"):
        corpus(tiny_recipe(**{"data.shards": str(tmp_path)}), None, None)


def test_a_cores_rate_is_that_of_the_recipes_decoder() -> None:
    """From this repository's own results: two workers on two cores."""
    variants = json.loads(Path("benchmarks/results/data-photos-2-workers.json").read_text())["variants"]
    for decoder in ("fast", "pillow"):
        rate = worker_rate(tiny_recipe(**{"data.decoder": decoder}), Path("benchmarks/results"))
        assert rate is not None
        assert rate.images_per_second == variants[decoder]["images_per_second"] / 2
        assert (rate.img_size, rate.file) == (224, "data-photos-2-workers.json")


def test_a_rate_at_the_recipes_size_is_preferred(tmp_path: Path) -> None:
    entry = {
        "img_size": 224,
        "num_workers": 4,
        "cores": 2,
        "cpu": "x",
        "variants": {"fast": {"images_per_second": 900}},
    }
    (tmp_path / "data-a.json").write_text(json.dumps(entry))
    (tmp_path / "data-b.json").write_text(json.dumps({**entry, "img_size": 64, "num_workers": 1}))
    rate = worker_rate(tiny_recipe(**{"encoder.img_size": 64}), tmp_path)
    assert rate is not None
    assert (rate.images_per_second, rate.file) == (900, "data-b.json")
    larger = worker_rate(tiny_recipe(**{"encoder.img_size": 224, "encoder.window_size": [7, 7, 7, 7]}), tmp_path)
    assert larger is not None
    assert (larger.images_per_second, larger.file) == (450, "data-a.json")
    assert worker_rate(tiny_recipe(**{"data.decoder": "pillow"}), tmp_path) is None


def test_cores_and_workers_bring_the_rate() -> None:
    recipe = tiny_recipe(**{"encoder.img_size": 64, "data.num_workers": 3, "data.prefetch_factor": 2})
    rate = worker_rate(recipe, Path("benchmarks/results"))
    assert rate is not None
    data = corpus(recipe, 10, 1000)
    needed = loading(recipe, 10 * rate.images_per_second + 1, 4, 16, data, rate)
    assert (needed.cores, needed.workers) == (11, 3)
    assert needed.bytes_per_second == needed.images_per_second * 1000
    assert needed.host_bytes == 4 * 3 * 2 * 16 * 3 * 64 * 64  # ranks, workers, batches, images
    unknown = loading(recipe, 100, 4, 16, data, None)
    assert (unknown.cores, unknown.workers) == (None, None)
    assert unknown.host_bytes == needed.host_bytes
