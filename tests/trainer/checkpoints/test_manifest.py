"""Manifests say when anything about a checkpoint is not what was written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import xxhash

from mixmae.base.run_directory import CHECKPOINTS, checkpoint_name
from mixmae.trainer.checkpoints.manifest import MANIFEST, DamagedError, FileRecord, Manifest, verify_file

CONTENT = bytes(range(256)) * 40


def manifest(
    step: int, files: dict[str, FileRecord], loss: float | None = 0.5, metrics: Mapping[str, float] = {}
) -> Manifest:
    return Manifest(
        step=step,
        epoch=step / 10,
        loss=loss,
        state={"step": step, "samples": 8 * step},
        position={"seed": 0, "samples": 8 * step, "fingerprint": "f"},
        metrics=dict(metrics),
        world_size=1,
        zero_stage=1,
        recipe={"seed": 0},
        versions={"torch": "2"},
        shapes={"weight": [2, 3], "bias": [3]},
        frozen=["bias"],
        optimizer_states=["momentum_buffer"],
        optimizer_scalars={"step": float(step)},
        files=files,
    )


def make(run_dir: Path, step: int, loss: float | None = 0.5, metrics: Mapping[str, float] = {}) -> Path:
    folder = run_dir / CHECKPOINTS / checkpoint_name(step)
    folder.mkdir(parents=True)
    (folder / "rank-00000.safetensors").write_bytes(CONTENT)
    written = FileRecord(len(CONTENT), xxhash.xxh3_128_hexdigest(CONTENT))
    manifest(step, {"rank-00000.safetensors": written}, loss, metrics).write(folder)
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


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no files": ({"files": {}}, "names no files"),
    "files of another kind": ({"files": []}, "has a files that no checkpoint has"),
    "a file elsewhere": ({"files": {f"../{MANIFEST}": {"bytes": 1, "xxh3_128": ""}}}, "is missing"),
    "an unknown fact of a file": ({"files": {"x": {"bytes": 1, "xxh3_128": "", "x": 1}}}, "has a files.x.x that"),
    "an unknown key": ({"later": 1}, "has a later that"),
    "a step in words": ({"step": "three"}, "has a step that"),
    "a list as state": ({"state": []}, "has a state that"),
    "a number as name": ({"shapes": {"weight": ["x"]}}, r"has a shapes\.weight\.0 that"),
    "another format": ({"format": 99}, "has format 99"),
    "no format": ({"format": None}, "has format None"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_manifest_of_somebody_else_is_damaged(kind: str, tmp_path: Path) -> None:
    """Its checksum fits: nothing but its content is wrong."""
    folder = make(tmp_path, 3)
    changes, message = WRONG[kind]
    content = {**json.loads((folder / MANIFEST).read_text()), **changes}
    del content["xxh3_128"]
    digest = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    (folder / MANIFEST).write_text(json.dumps({"xxh3_128": digest, **content}))
    with pytest.raises(DamagedError, match=message):
        Manifest.read(folder)


def test_what_is_wrong_with_a_checkpoint_is_told(tmp_path: Path) -> None:
    folder = make(tmp_path, 3)
    file = folder / "rank-00000.safetensors"
    whole = Manifest.read(folder)
    file.write_bytes(CONTENT[:-1])
    with pytest.raises(DamagedError, match="has 10239 bytes, expected 10240"):
        Manifest.read(folder)
    file.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(DamagedError, match="does not match its checksum"):
        verify_file(file, whole.files[file.name])
    file.unlink()
    with pytest.raises(DamagedError, match=r"rank-00000\.safetensors is missing"):
        Manifest.read(folder)
    for text in ("{", "[]", "[" * 100_000, ""):
        (folder / MANIFEST).write_text(text)
        with pytest.raises(DamagedError, match="cannot be read"):
            Manifest.read(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(DamagedError, match=r"manifest\.json is missing"):
        Manifest.read(folder)
