"""Runs that start from weights of others: read from names, directories and files, told in a table, or refused."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.models import create_encoder
from mixmae.trainer.export.foreign_weights import read_foreign_weights
from mixmae.trainer.export.initial_weights import initialise_backbone, initialise_classifier
from mixmae.trainer.export.load_foreign import load_foreign_weights
from mixmae.trainer.tasks.registry import task_of
from tests.helpers import ROOT, tiny_recipe

SMALL: dict[str, Any] = {"img_size": 64, "embed_dim": 64, "depth": 4, "num_heads": 2}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Of timm's ViT as small as our nano, for images of another size, with a class token and a head."""
    torch.manual_seed(0)
    return VisionTransformer(num_classes=5, **SMALL).state_dict()


def timm_directory(state: dict[str, Tensor], folder: Path) -> Path:
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    facts = {"input_size": [3, 64, 64], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    content = {"architecture": "vit_small_patch16_224", "num_classes": 5, "model_args": {}, "pretrained_cfg": facts}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def torch_file(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "weights.pth")
    return folder / "weights.pth"


def safetensors_file(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


SOURCES: dict[str, Callable[[dict[str, Tensor], Path], Path]] = {
    "timm directory": lambda state, folder: timm_directory(state, folder / "timm"),
    "safetensors": safetensors_file,
    "state dict": torch_file,
    "half precision": lambda state, folder: torch_file({k: v.half() for k, v in state.items()}, folder),
    "training script's": lambda state, folder: torch_file({"model": state, "epoch": 3, "lr": Path("x")}, folder),
    "of a parallel module": lambda state, folder: torch_file(
        {"state_dict": {f"module.backbone.{name}": value for name, value in state.items()}}, folder
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_weights_are_found_wherever_they_are(state: dict[str, Tensor], tmp_path: Path, source: str) -> None:
    encoder = create_encoder("mixmae_vit_nano", img_size=64)
    initialise_classifier(encoder, str(SOURCES[source](state, tmp_path)), ())
    atol = 1e-3 if source == "half precision" else 0
    weights = encoder.state_dict()
    for own, theirs in {
        "stages.3.blocks.0.mlp.fc1.weight": "blocks.3.mlp.fc1.weight",
        "norm.bias": "norm.bias",
    }.items():
        torch.testing.assert_close(weights[own], state[theirs], atol=atol, rtol=0)
    torch.testing.assert_close(weights["pos_embed.weight"], state["pos_embed"][:, 1:], atol=atol, rtol=0)


def test_a_table_tells_what_became_of_them(
    state: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    init = timm_directory({name: v for name, v in state.items() if name != "norm.bias"}, tmp_path / "timm")
    with caplog.at_level(logging.INFO, "mixmae"):
        initialise_classifier(create_encoder("mixmae_vit_nano", img_size=128), str(init), ())
    assert caplog.messages == [
        f"encoder.init: {init}/model.safetensors, trained on 64x64 px with data.mean=[0.5, 0.5, 0.5] and "
        "data.std=[0.5, 0.5, 0.5]",
        "  loaded      52  norm, patch_embed, pos_embed, stages.0, stages.1, stages.2, stages.3",
        "  resized      1  1 x pos_embed.weight 1x16x64 -> 1x64x64",
        "  left out     3  cls_token, head.fc.bias, head.fc.weight",
        "  missing      1  norm.bias, as new",
    ]


def test_backbones_take_no_final_norm(state: dict[str, Tensor], tmp_path: Path) -> None:
    encoder = create_encoder("mixmae_vit_nano", img_size=64)
    before = encoder.state_dict()["norm.weight"].clone()
    initialise_backbone(encoder, str(safetensors_file({**state, "norm.weight": torch.full((64,), 3.0)}, tmp_path)))
    assert torch.equal(encoder.state_dict()["norm.weight"], before)


def test_released_simmim_and_mae_are_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    def released(name: str) -> str:
        reference = load_file(ROOT / "tests" / "data" / f"{name}.safetensors")
        states = {key.removeprefix("state."): value for key, value in reference.items() if key.startswith("state.")}
        return str(torch_file({"model": states, "optimizer": {}, "epoch": 799}, tmp_path))

    sizes: dict[str, Any] = {"img_size": 64, "embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
    encoder = create_encoder("mixmae_swin_nano", window_size=[8, 8, 4, 2], **sizes)
    result = load_foreign_weights(encoder, read_foreign_weights(released("simmim_tiny")), ("head.",))
    assert len(result.loaded) == len(list(encoder.parameters()))
    assert result.resized == [
        "2 x relative_position_bias_table 49x1 -> 225x1",
        "2 x relative_position_bias_table 49x2 -> 225x2",
    ]
    assert {"mask_token", "decoder.0.bias"} <= set(result.left_out)
    found = read_foreign_weights(released("mae_tiny"))
    with pytest.raises(UsageError, match=r"of the encoder's sizes, or the encoder's sizes from them"):
        load_foreign_weights(create_encoder("mixmae_vit_nano", img_size=64), found, ("head.",))
    assert {"cls_token", "mask_token", "decoder_pred.bias"} <= set(
        create_encoder("mixmae_vit_nano").convert(found.state).left_out
    )


def test_pretraining_starts_from_them(tmp_path: Path) -> None:
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 64, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    state = SwinTransformer(window_size=2, num_classes=3, **sizes).state_dict()
    task = task_of(tiny_recipe(**{"encoder.init": str(safetensors_file(state, tmp_path))}))
    module = task.build()
    task.initialise(module)
    assert torch.equal(
        module.get_parameter("encoder.stages.2.downsample.norm.weight"), state["layers.2.downsample.norm.weight"]
    )
    assert torch.equal(module.get_parameter("encoder.patch_embed.proj.weight"), state["patch_embed.proj.weight"])


def swin_v2() -> dict[str, Tensor]:
    sizes: dict[str, Any] = {"img_size": 64, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    return SwinTransformerV2(window_size=4, num_classes=0, **sizes).state_dict()


REFUSED: dict[str, tuple[Callable[[Path, dict[str, Tensor]], str], str, str]] = {
    "swin v2": (
        lambda folder, _: str(safetensors_file(swin_v2(), folder)),
        "swin_nano",
        r"the first is '.*(logit|cpb)",
    ),
    "another family": (
        lambda folder, state: str(safetensors_file(state, folder)),
        "swin_nano",
        "not fit this Swin: .*",
    ),
    "another size": (
        lambda folder, state: str(safetensors_file(state, folder)),
        "vit_small",
        "; they fit encoder.name=mixmae_vit_nano",
    ),
    "no state dict": (lambda folder, _: str(torch_file([1], folder)), "vit_nano", "holds no state dict"),
    "nothing": (lambda folder, _: str(torch_file({"model": {}, "x": 1}, folder)), "vit_nano", "holds no weights"),
    "cut": (
        lambda folder, state: str(cut(safetensors_file(state, folder))),
        "vit_nano",
        "cannot be read",
    ),
    "mixmim": (
        lambda folder, _: str(torch_file({"model": {"absolute_pos_embed": torch.zeros(1)}}, folder)),
        "swin_nano",
        "'mixmae import .* OUT' converts those",
    ),
    "not finite": (
        lambda folder, state: str(safetensors_file({**state, "norm.bias": torch.full((64,), torch.nan)}, folder)),
        "vit_nano",
        "norm.bias holds values that are not finite",
    ),
    "no such model": (
        lambda *_: "timm:swin_base_patch4_window7_24",
        "swin_nano",
        "mean timm:swin_base_patch4_window7_224",
    ),
    "no such weights": (lambda *_: "timm:swin_base_patch4_window7_224.x", "swin_nano", "it has .*ms_in1k"),
    "none at all": (lambda *_: "timm:mixmae_swin_base", "swin_nano", "it has none of it"),
    "no file": (lambda folder, _: str(folder / "none.pth"), "swin_nano", "none.pth does not exist"),
}


def cut(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:100])
    return file


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_line(state: dict[str, Tensor], tmp_path: Path, case: str) -> None:
    make, encoder, message = REFUSED[case]
    with pytest.raises(UsageError, match=rf"^encoder.init: .*{message}") as caught:
        initialise_classifier(create_encoder(f"mixmae_{encoder}", img_size=128), make(tmp_path, state), ())
    assert "\n" not in str(caught.value)


NAME = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
SIZE: dict[str, Any] = {"img_size": 224, "embed_dim": 192, "depth": 12, "num_heads": 3}


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=r"^encoder.init: the weights of vit_tiny\S+ are not in the cache") as caught:
        initialise_classifier(create_encoder("mixmae_vit_nano", **SIZE), f"timm:{NAME}", ())
    assert "\n" not in str(caught.value)


def test_what_is_in_the_cache_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / f"models--timm--{NAME}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    expected = timm.create_model("vit_tiny_patch16_224").state_dict()
    save_file(expected, cached / "snapshots" / ("0" * 40) / "model.safetensors")
    encoder = create_encoder("mixmae_vit_nano", **SIZE)
    initialise_classifier(encoder, f"timm:{NAME}", ())
    assert torch.equal(encoder.state_dict()["stages.3.blocks.2.mlp.fc2.weight"], expected["blocks.11.mlp.fc2.weight"])
