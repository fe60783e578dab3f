import gzip
from pathlib import Path

import numpy as np
import pytest

from mixmae.base.errors import UsageError
from mixmae.trainer.data.decode import center_resized_crop
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.idx import IdxImages, IdxSource, read_idx, read_idx_pair
from tests.helpers import idx_file

IMAGES = np.arange(12 * 6 * 5, dtype=np.int64).reshape(12, 6, 5).astype(np.uint8)
LABELS = np.array([0, 1, 2] * 4, np.uint8)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_what_is_read_is_what_was_written(tmp_path: Path, suffix: str) -> None:
    images, labels = tmp_path / f"images{suffix}", tmp_path / f"labels{suffix}"
    for file, array in ((images, IMAGES), (labels, LABELS)):
        content = idx_file(array)
        file.write_bytes(gzip.compress(content) if suffix else content)
    found = read_idx_pair(images, labels)
    assert (found.images == IMAGES).all()
    assert (found.labels == LABELS).all()
    with pytest.raises(UsageError, match="no IDX file of bytes with 3 dimensions"):
        read_idx_pair(labels, labels)


def test_damaged_files_are_refused_in_words(tmp_path: Path) -> None:
    file = tmp_path / "images"
    with pytest.raises(UsageError, match=r"cannot read .*No such file"):
        read_idx(file, 3)
    file.write_bytes(idx_file(IMAGES)[:-1])
    with pytest.raises(UsageError, match="holds 359 values; its head says 12 x 6 x 5"):
        read_idx(file, 3)
    cut = tmp_path / "images.gz"
    cut.write_bytes(gzip.compress(idx_file(IMAGES))[:40])
    with pytest.raises(UsageError, match="cannot read"):
        read_idx(cut, 3)


def test_a_balanced_choice_has_as_many_of_each_class() -> None:
    found = IdxImages(IMAGES, LABELS)
    chosen = found.balanced(2, seed=0)
    assert np.bincount(LABELS[chosen]).tolist() == [2, 2, 2]
    assert chosen == found.balanced(2, seed=0) != found.balanced(2, seed=1)
    with pytest.raises(UsageError, match="class 0 has 4 images; expected 5 or more"):
        found.balanced(5, seed=0)


def test_shards_hold_the_chosen_pixels(tmp_path: Path) -> None:
    square = np.ascontiguousarray(IMAGES[:, :5])
    index = build_shards(IdxSource(IdxImages(square, LABELS), [3, 7]), tmp_path / "out", 10**6, seed=0, jobs=1).index
    assert sorted(index.samples["label"].tolist()) == [0, 1]
    for number in range(2):
        row = index.samples[number]
        pixels = center_resized_crop(index.read(number), int(row["state"]), 5, 1.0)
        assert (pixels.numpy() == square[3 if row["label"] == 0 else 7][None]).all()
