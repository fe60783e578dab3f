import io
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixmae.base.errors import UsageError
from mixmae.trainer.data.annotations import AnnotationKind
from mixmae.trainer.data.dense.held_out import held_out_scenes
from mixmae.trainer.data.dense.label_maps import parse_label_map
from mixmae.trainer.data.dense.objects import Objects
from mixmae.trainer.data.dense.resizing import fit_into, fit_over
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.scenes import Scenes
from mixmae.trainer.engine.distributed import Ranks

FITS = {"objects": partial(fit_into, window=(40, 40)), "segments": partial(fit_over, window=(20, 20))}


@pytest.mark.parametrize("kind", ["objects", "segments"])
def test_every_image_counts_once_and_ranks_take_equal_steps(kind: AnnotationKind, tmp_path: Path) -> None:
    index = build_shards(Scenes(7, 48, 0, kind), tmp_path / "out", 10_000, 0, 1).index
    beats: list[int] = []
    of_ranks = [list(held_out_scenes(index, Ranks(rank, 3), FITS[kind], lambda: beats.append(1))) for rank in range(3)]
    assert [len(scenes) for scenes in of_ranks] == [3, 3, 3]
    assert len(beats) == 9
    assert sorted(scene.sample for scenes in of_ranks for scene in scenes if scene.counts) == list(range(7))
    for scene in of_ranks[0]:
        image = Image.open(io.BytesIO(index.read(scene.sample))).convert("RGB")
        assert scene.original_size == (image.height, image.width)
        sides = sorted(scene.image.shape[1:])
        assert sides[1] == 40 if kind == "objects" else sides[0] == 20
        _, height, width = scene.image.shape
        expected = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        difference = np.abs(scene.image.permute(1, 2, 0).numpy().astype(int) - expected)
        assert difference.mean() < 1  # two decoders
        if isinstance(scene.annotation, Objects):
            assert (scene.annotation.height, scene.annotation.width) == scene.original_size
        else:
            assert np.array_equal(
                scene.annotation, parse_label_map(index.read_annotation(scene.sample), *scene.original_size)
            )


def test_more_ranks_than_images_fill_up(tmp_path: Path) -> None:
    index = build_shards(Scenes(2, 48, 0, "objects"), tmp_path / "out", 10_000, 0, 1).index
    counts = [[scene.counts for scene in held_out_scenes(index, Ranks(rank, 3), FITS["objects"])] for rank in range(3)]
    assert counts == [[True], [True], [False]]


def test_an_image_that_is_gone_is_told(tmp_path: Path) -> None:
    index = build_shards(Scenes(2, 48, 0, "objects"), tmp_path / "out", 10_000, 0, 1).index
    (tmp_path / "out" / "000000.tar").write_bytes(b"")
    with pytest.raises(UsageError, match="cannot be used: shard cut"):
        list(held_out_scenes(open_index(tmp_path / "out"), Ranks(), FITS["objects"]))
    index.store.close()


def test_sizes_keep_the_aspect() -> None:
    assert fit_into(480, 640, (1024, 1024)) == (768, 1024)
    assert fit_into(1, 1000, (10, 10)) == (1, 10)
    assert fit_over(480, 640, (512, 512)) == (512, 683)
    assert fit_over(100, 900, (512, 512)) == (228, 2048)
    assert fit_into(480, 640, (512, 1024)) == (512, 683)
    assert fit_over(480, 640, (512, 1024)) == (768, 1024)
    assert fit_over(640, 480, (512, 1024)) == (1365, 1024)
