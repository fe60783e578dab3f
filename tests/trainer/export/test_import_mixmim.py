import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from mixmae.base.errors import UsageError, run_cli
from mixmae.models.encoders.registry import create_encoder
from mixmae.trainer.export.import_mixmim import convert, main, read_release
from tests.helpers import ROOT

REFERENCE = ROOT / "tests" / "data" / "mixmim_tiny.safetensors"


@pytest.fixture(scope="module")
def released() -> dict[str, Tensor]:
    states = {name: value for name, value in load_file(REFERENCE).items() if name.startswith("state.")}
    return {name.removeprefix("state."): value for name, value in states.items()}


@pytest.fixture(scope="module")
def pooled() -> tuple[Tensor, Tensor]:
    reference = load_file(REFERENCE)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (reference["images_uint8"] / 255 - mean[:, None, None]) / std[:, None, None]
    return images, reference["pooled_features_unmixed"]


def fine_tuned(released: dict[str, Tensor]) -> dict[str, Tensor]:
    encoder = {name: value for name, value in released.items() if not name.startswith(("decoder", "mask_token"))}
    index = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(196, 196).long()}
    return {**encoder, **index, "head.weight": torch.randn(10, 128), "head.bias": torch.zeros(10)}


def test_pretraining_checkpoint(released: dict[str, Tensor], pooled: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    torch.save({"model": released, "epoch": 599}, tmp_path / "release.pth")
    assert main([str(tmp_path / "release.pth"), str(tmp_path / "out")]) == 0
    encoder = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    torch.testing.assert_close(encoder(pooled[0]), pooled[1], atol=1e-4, rtol=0)
    assert "decoder.mask_token" in load_file(tmp_path / "out" / "method.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]["embed_dim"] == 16


def test_fine_tuned_checkpoint(released: dict[str, Tensor], tmp_path: Path) -> None:
    state = fine_tuned(released)
    torch.save({"model": state}, tmp_path / "release.pth")
    assert main([str(tmp_path / "release.pth"), str(tmp_path / "out")]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert torch.equal(model.head.fc.weight, state["head.weight"])
    assert not (tmp_path / "out" / "method.safetensors").exists()


def test_sizes_of_the_paper_are_recognised(tmp_path: Path) -> None:
    encoder = create_encoder("mixmae_swin_base_w14", depths=(1, 1, 1, 1))
    names = {name: value for name, value in encoder.state_dict().items() if not name.startswith("stages.")}
    names |= {
        f"layers.{name.removeprefix('stages.')}": value
        for name, value in encoder.state_dict().items()
        if name.startswith("stages.") and "downsample" not in name
    }
    names |= {
        f"layers.{int(name[7]) - 1}{name[8:]}": value
        for name, value in encoder.state_dict().items()
        if "downsample" in name
    }
    torch.save({"model": names}, tmp_path / "release.pth")
    main([str(tmp_path / "release.pth"), str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "mixmae_swin_base_w14"
    assert config["model_args"] == {"depths": [1, 1, 1, 1], "pretrain_img_size": [224, 224]}


@pytest.mark.parametrize(
    "change",
    [
        "foreign",
        "missing",
        "missing block",
        "half a decoder",
        "other shape",
        "positions",
        "mae",
        "no model",
        "not a checkpoint",
        "a picture",
        "a folder",
        "no file",
    ],
)
def test_anything_unknown_is_one_clear_line(
    released: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    file = tmp_path / "release.pth"
    state = dict(released)
    if change == "foreign":
        state["layers.0.blocks.0.attn.logit_scale"] = torch.zeros(1)
    elif change == "missing":
        del state["layers.1.downsample.reduction.weight"]
    elif change == "missing block":
        del state["layers.2.blocks.1.attn.qkv.weight"]
    elif change == "half a decoder":
        del state["decoder_pred.weight"]
    elif change == "other shape":
        state["layers.2.blocks.1.mlp.fc1.bias"] = torch.zeros(3)
    elif change == "mae":
        state = {"decoder_pos_embed": torch.zeros(1, 197, 512), "blocks.0.attn.qkv.weight": torch.zeros(3, 3)}
    elif change == "positions":
        state["absolute_pos_embed"] = state["absolute_pos_embed"] + 0.1
    torch.save({"state": state} if change == "no model" else {"model": state}, file)
    if change == "not a checkpoint":
        file.write_bytes(b"something else")
    elif change == "a picture":
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    elif change in ("no file", "a folder"):
        file.unlink()
        if change == "a folder":
            file.mkdir()
    assert run_cli(main, [str(file), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mixmae: error:")
    assert error.count("\n") == 1
    assert not error.rstrip().endswith(":")
    assert ("does not exist" in error) == (change == "no file")
    assert not (tmp_path / "out").exists()


def test_nothing_is_unpickled_but_tensors(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "owned"),)

    for content in ({"model": {}, "args": Payload()}, {"model": Payload()}, Payload()):
        torch.save(content, tmp_path / "release.pth")
        with pytest.raises(UsageError):
            main([str(tmp_path / "release.pth"), str(tmp_path / "out")])
        assert not (tmp_path / "owned").exists()


class Settings:
    """Of the script that trained."""

    def __init__(self) -> None:
        self.lr = 1.0


@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_scripts_save_beside_the_weights_is_passed_over(
    released: dict[str, Tensor], tmp_path: Path, zipped: bool
) -> None:
    args = argparse.Namespace(lr=1.0, output_dir=Path("out"), best=np.float64(0.5), seeds=np.arange(3), own=Settings())
    beside = {"optimizer": {"state": {}}, "epoch": 1, "scaler": {}, "args": args, "meters": defaultdict(list, loss=[1])}
    half = {name: value.half() for name, value in released.items()}
    file = tmp_path / "release.pth"
    torch.save({"model": half, **beside}, file, _use_new_zipfile_serialization=zipped)
    state = read_release(file)
    assert state.keys() == released.keys()
    assert all(value.dtype == torch.float32 for value in state.values())
    convert(state)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "int8"])
def test_weights_that_are_none_are_refused(released: dict[str, Tensor], tmp_path: Path, value: float | str) -> None:
    state = dict(released)
    own = state["norm.weight"]
    state["norm.weight"] = own.to(torch.int8) if value == "int8" else torch.full_like(own, float(value))
    torch.save({"model": state}, tmp_path / "release.pth")
    with pytest.raises(UsageError, match=r"norm\.weight holds"):
        read_release(tmp_path / "release.pth")


def test_existing_directories_are_kept(released: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"model": released}, tmp_path / "release.pth")
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        main([str(tmp_path / "release.pth"), str(tmp_path / "out")])
