"""Encoder directories that were cut, edited or made by something else: one line each."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import HfApi, RepoUrl
from safetensors.torch import load_file, save_file

from mixmae.base.errors import UsageError
from mixmae.models import create_encoder
from mixmae.trainer.export.encoder_directory import CONFIG, ENCODER, load_encoder, write_encoder_directory
from mixmae.trainer.export.initial_weights import initialise_classifier, initialise_method
from mixmae.trainer.recipe.loading import default_recipe
from mixmae.trainer.tasks.registry import build_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoders") / "good"
    before = os.umask(0o027)
    try:
        write_encoder_directory(out, "mixmae_vit_nano", {}, create_encoder("mixmae_vit_nano").state_dict())
    finally:
        os.umask(before)
    return out


def test_an_encoder_of_rectangles_opens_as_it_was(tmp_path: Path) -> None:
    encoder: Any = create_encoder("mixmae_vit_nano", img_size=(64, 128))
    write_encoder_directory(tmp_path / "out", "mixmae_vit_nano", {"img_size": (64, 128)}, encoder.state_dict())
    opened: Any = load_encoder(tmp_path / "out")
    assert opened.pretrained_cfg["input_size"] == (3, 64, 128)
    images = torch.randn(2, 3, 64, 128)
    torch.testing.assert_close(opened(images), encoder(images).mean((1, 2)))
    larger: Any = load_encoder(tmp_path / "out", img_size=(128, 256))
    assert larger(torch.randn(1, 3, 128, 256)).shape == (1, 64)
    # As many tokens in another shape.
    wide: Any = load_encoder(tmp_path / "out", img_size=(32, 256))
    encoder.set_input_size((32, 256))
    torch.testing.assert_close(wide.pos_embed.weight, encoder.pos_embed.weight)
    assert not torch.equal(wide.pos_embed.weight, opened.pos_embed.weight)
    started: Any = create_encoder("mixmae_vit_nano", img_size=(32, 256))
    initialise_classifier(started, tmp_path / "out", ())
    torch.testing.assert_close(started.pos_embed.weight, encoder.pos_embed.weight)


def test_all_files_follow_the_umask(directory: Path) -> None:
    assert {file.stat().st_mode & 0o777 for file in directory.iterdir()} == {0o640}


def changed(key: str, value: object) -> Callable[[Path], None]:
    """Sets a key of config.json."""

    def change(directory: Path) -> None:
        config: dict[str, Any] = json.loads((directory / CONFIG).read_text())
        *sections, last = key.split(".")
        here = config
        for section in sections:
            here = here[section]
        here[last] = value
        (directory / CONFIG).write_text(json.dumps(config))

    return change


def with_weight(change: Callable[[torch.Tensor], torch.Tensor], name: str = "norm.weight") -> Callable[[Path], None]:
    """Replaces a weight."""

    def save(directory: Path) -> None:
        state = load_file(directory / ENCODER)
        save_file({**state, name: change(state[name])}, directory / ENCODER)

    return save


def content(name: str, data: bytes | int) -> Callable[[Path], None]:
    """Writes a file anew, or cuts it."""

    def write(directory: Path) -> None:
        if isinstance(data, int):
            os.truncate(directory / name, data)
        else:
            (directory / name).write_bytes(data)

    return write


CONFIGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (content(CONFIG, b""), "config.json"),
    "not text": (content(CONFIG, b"\xff\xfe"), "config.json"),
    "deep": (content(CONFIG, b"[" * 50_000), "config.json"),
    "a list": (content(CONFIG, b"[1]"), "expected keys and values"),
    "no keys": (content(CONFIG, b"{}"), "architecture.*is missing"),
    "missing": (lambda directory: (directory / CONFIG).unlink(), "config.json"),
    "architecture": (changed("architecture", "resnet50"), "unknown encoder 'resnet50'"),
    "architecture of another type": (changed("architecture", 3), "architecture=3: expected text"),
    "another architecture": (changed("architecture", "mixmae_swin_nano"), "num_features|do not fit"),
    "width": (changed("num_features", 3), "num_features=3"),
    "sizes": (changed("model_args", [1]), "model_args=.*expected keys"),
    "foreign size": (changed("model_args", {"window": 3}), "unknown key 'model_args.window'"),
    "wrong size": (changed("model_args", {"depth": 3}), "depth 3"),
    "size of another type": (changed("model_args", {"depth": "x"}), "model_args.depth='x'"),
    "mean": (changed("pretrained_cfg.mean", [0, float("nan"), 0]), "mean.*finite"),
    "std": (changed("pretrained_cfg.std", [0, 1, 1]), "std.*greater than 0"),
    "two of three": (changed("pretrained_cfg.mean", [0, 1]), "mean.* has 2 values; expected one for each"),
    "channels": (changed("data", {"channels": 5}), r"one for each of data\.channels=5"),
    "pixels of another type": (changed("data", {"dtype": "int4"}), "dtype='int4'"),
    "input": (changed("pretrained_cfg.input_size", "224"), "input_size='224': expected a list"),
}
WEIGHTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda directory: (directory / ENCODER).unlink(), "does not exist"),
    "empty": (content(ENCODER, b""), "cannot be read"),
    "cut header": (content(ENCODER, 100), "cannot be read"),
    "cut": (content(ENCODER, 20_000), "cannot be read"),
    "pickle": (content(ENCODER, b"\x80\x02}q\x00."), "cannot be read"),
    "nan": (with_weight(lambda w: w * float("nan")), "norm.weight holds values that are not finite"),
    "int8": (with_weight(lambda w: w.to(torch.int8)), "norm.weight holds int8"),
    "shape": (with_weight(lambda w: w[:3].clone()), "fit"),
    "positions": (with_weight(lambda w: w[:, :7].clone(), "pos_embed.weight"), "fit"),
}


@pytest.mark.parametrize("case", [*CONFIGS, *(f"weights: {case}" for case in WEIGHTS)])
def test_directories_that_are_none_are_one_line(directory: Path, tmp_path: Path, case: str) -> None:
    change, message = WEIGHTS[case.removeprefix("weights: ")] if case.startswith("weights") else CONFIGS[case]
    shutil.copytree(directory, tmp_path / "e")
    change(tmp_path / "e")
    with pytest.raises(UsageError, match=message) as caught:
        load_encoder(tmp_path / "e")
    assert "\n" not in str(caught.value)


def test_a_run_does_not_start_from_them(directory: Path, tmp_path: Path) -> None:
    model: Any = build_model(default_recipe(["encoder.name=mixmae_vit_nano", "encoder.img_size=128"]))
    initialise_method(model, directory, "mixmae")
    for case, (change, message) in WEIGHTS.items():
        shutil.copytree(directory, tmp_path / case)
        change(tmp_path / case)
        with pytest.raises(UsageError, match=f"encoder.init: .*{message}"):
            initialise_method(model, tmp_path / case, "mixmae")


def test_positions_stay_those_of_pretraining_at_another_size(tmp_path: Path) -> None:
    """Recomputed ones would lie outside of what the weights have seen."""
    small: Any = create_encoder("mixmae_swin_nano")
    write_encoder_directory(tmp_path / "small", "mixmae_swin_nano", {}, small.state_dict())
    sizes: dict[str, Any] = {"img_size": 192}
    with pytest.raises(UsageError, match=r"encoder\.init: .* of 128x128 px, .* set encoder\.pretrain_img_size=128"):
        initialise_classifier(create_encoder("mixmae_swin_nano", **sizes), tmp_path / "small", ())
    with pytest.raises(UsageError, match=r"set encoder\.pretrain_img_size=128"):
        initialise_classifier(create_encoder("mixmae_swin_nano", **sizes), tmp_path / "small" / ENCODER, ())
    large: Any = create_encoder("mixmae_swin_nano", **sizes, pretrain_img_size=128)
    initialise_classifier(large, tmp_path / "small", ())
    opened: Any = load_encoder(tmp_path / "small", **sizes)
    small.set_input_size(192)
    assert large.positions.shape == (48, 48, 32)
    assert torch.equal(large.positions, opened.positions)
    assert torch.equal(large.positions, small.positions)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_timm_pushes_to_the_hub_what_timm_opens_again(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_classes: int
) -> None:
    def upload(api: HfApi, *, folder_path: str, **_: Any) -> None:
        shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **_: RepoUrl(f"https://huggingface.co/{repo_id}"))
    monkeypatch.setattr(HfApi, "file_exists", lambda api, **_: False)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    pushed: Any = load_encoder(directory, num_classes=num_classes, img_size=96).eval()
    timm.models.push_to_hf_hub(pushed, "me/photos")
    opened = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(opened(images), pushed(images))
