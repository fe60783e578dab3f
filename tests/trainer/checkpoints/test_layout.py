"""Manifests say when anything about a checkpoint is not what was written; the history is what one would resume from."""

import json
from pathlib import Path

import pytest
import xxhash

from mixmae.base.run_directory import (
    CHECKPOINTS,
    NEWEST,
    checkpoint_history,
    checkpoint_name,
    complete_checkpoints,
    named_newest,
    newest_step,
)
from mixmae.trainer.checkpoints.layout import (
    MANIFEST,
    DamagedError,
    Manifest,
    Written,
    lost,
    point_to,
    set_aside,
    verify_file,
)

CONTENT = bytes(range(256)) * 40


def manifest(step: int, files: dict[str, Written], loss: float | None = 0.5) -> Manifest:
    return Manifest(
        step=step,
        optimizer_step=step,
        epoch=step / 10,
        loss=loss,
        state={"step": step, "samples": 8 * step},
        position={"seed": 0, "samples": 8 * step, "fingerprint": "f"},
        world_size=1,
        zero_stage=1,
        recipe={"seed": 0},
        versions={"torch": "2"},
        shapes={"weight": [2, 3]},
        files=files,
    )


def make(run_dir: Path, step: int, loss: float | None = 0.5) -> Path:
    folder = run_dir / CHECKPOINTS / checkpoint_name(step)
    folder.mkdir(parents=True)
    (folder / "rank-00000.safetensors").write_bytes(CONTENT)
    written = Written(len(CONTENT), xxhash.xxh3_128_hexdigest(CONTENT))
    manifest(step, {"rank-00000.safetensors": written}, loss).write(folder)
    return folder


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = make(tmp_path, 3)
    found = Manifest.read(folder)
    assert found == manifest(3, dict(found.files))
    assert found.bytes == len(CONTENT)
    for file in found.paths(folder):
        verify_file(file, found.files[file.name])


@pytest.mark.parametrize("byte", range(0, 600, 7))
def test_any_flipped_bit_of_a_manifest_is_noticed(tmp_path: Path, byte: int) -> None:
    folder = make(tmp_path, 3)
    content = bytearray((folder / MANIFEST).read_bytes())
    at = byte % len(content)
    content[at] ^= 1
    try:
        same = json.loads(content) == json.loads((folder / MANIFEST).read_bytes())
    except ValueError:
        same = False
    (folder / MANIFEST).write_bytes(content)
    if same:  # white space
        return
    with pytest.raises(DamagedError, match=r"manifest\.json|missing"):
        Manifest.read(folder)


def test_what_is_wrong_with_a_checkpoint_is_told(tmp_path: Path) -> None:
    folder = make(tmp_path, 3)
    file = folder / "rank-00000.safetensors"
    whole = Manifest.read(folder)
    file.write_bytes(CONTENT[:-1])
    with pytest.raises(DamagedError, match="has 10239 bytes, not the 10240 that were written"):
        Manifest.read(folder)
    file.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(DamagedError, match="other content than was written"):
        verify_file(file, whole.files[file.name])
    file.unlink()
    with pytest.raises(DamagedError, match=r"rank-00000\.safetensors is missing"):
        Manifest.read(folder)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(DamagedError, match="cannot be read"):
        Manifest.read(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(DamagedError, match=r"manifest\.json is missing"):
        Manifest.read(folder)


def test_the_history_begins_with_what_newest_names(tmp_path: Path) -> None:
    assert checkpoint_history(tmp_path) == []
    assert newest_step(tmp_path) == 0
    folders = [make(tmp_path, step) for step in (4, 8, 12)]
    point_to(folders[1])
    assert checkpoint_history(tmp_path) == [folders[1], folders[0]]
    assert newest_step(tmp_path) == 8
    (tmp_path / CHECKPOINTS / NEWEST).write_text("step-00000099\n")
    assert checkpoint_history(tmp_path) == folders[::-1]
    (tmp_path / CHECKPOINTS / NEWEST).unlink()
    assert checkpoint_history(tmp_path) == folders[::-1]


def test_what_is_set_aside_is_kept_but_no_checkpoint(tmp_path: Path) -> None:
    aside = [set_aside(make(tmp_path, 4)) for _ in range(3)]
    assert len(set(aside)) == 3
    assert all((folder / MANIFEST).is_file() for folder in aside)
    assert complete_checkpoints(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"\n", b"\0" * 14, b"\xff\xfe", b"..\n", b"step-\n", b"partial-00000003-0\n"])
def test_a_pointer_that_names_no_checkpoint_is_none(tmp_path: Path, content: bytes) -> None:
    """As a crash of the machine, or of its storage, leaves one."""
    make(tmp_path, 3)
    newest = make(tmp_path, 6)
    (tmp_path / CHECKPOINTS / NEWEST).write_bytes(content)
    assert named_newest(tmp_path) is None
    assert checkpoint_history(tmp_path)[0] == newest


def test_what_is_lost_leaves_traces(tmp_path: Path) -> None:
    assert lost(tmp_path) == []
    checkpoint = make(tmp_path, 3)
    assert lost(tmp_path) == []
    point_to(checkpoint)
    set_aside(checkpoint)
    assert lost(tmp_path) == [f"damaged-{checkpoint.name}", NEWEST]
