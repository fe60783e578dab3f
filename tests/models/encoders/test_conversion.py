"""Swin weights of timm, torchvision and SimMIM's authors: unmixed features are those of their models.

Theirs have shifted windows and no positions, ours unshifted ones and fixed positions: both are taken away for this.
"""

import json
import re
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, checkpoint_filter_fn
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

from mixmae.models import create_encoder
from mixmae.models.encoders.conversion import swin, vit
from tests.helpers import ROOT

SIZES: dict[str, Any] = {"embed_dim": 16, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 4, 8)}


def unshifted(model: nn.Module) -> Any:
    for module in model.modules():
        if isinstance(module, SwinTransformerBlock):
            module.shift_size, module.attn_mask = (0, 0), None
        elif isinstance(module, ShiftedWindowAttention):
            module.shift_size = [0, 0]
    return model.eval()


def of_timm(window: int = 4, **options: Any) -> SwinTransformer:
    return SwinTransformer(img_size=128, window_size=window, num_classes=7, drop_path_rate=0, **SIZES, **options)


def of_torchvision() -> TorchvisionSwin:
    sizes = {key: list(value) if isinstance(value, tuple) else value for key, value in SIZES.items()}
    return TorchvisionSwin(patch_size=[4, 4], window_size=[4, 4], num_classes=7, stochastic_depth_prob=0, **sizes)


def ours(**changes: Any) -> Any:
    return timm.create_model("mixmae_swin_nano", num_classes=7, **{**SIZES, "window_size": (4, 4, 4, 4), **changes})


@pytest.mark.parametrize("make", [of_timm, of_torchvision])
def test_unmixed_logits_are_those_of(make: Any) -> None:
    torch.manual_seed(0)
    theirs, model = unshifted(make()), ours().eval()
    for parameter in theirs.parameters():  # as trained ones: none that is zero, or one
        nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    converted = swin(dict(theirs.state_dict()))
    model.load_state_dict(converted.state)
    assert all("relative_position_index" in name for name in converted.left_out)
    model.positions.zero_()
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), atol=1e-5, rtol=1e-5)


def test_released_simmim_is_timms_swin() -> None:
    file = ROOT / "tests" / "data" / "simmim_tiny.safetensors"
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    state = {
        name.removeprefix("state.encoder."): value
        for name, value in load_file(file).items()
        if name.startswith("state.encoder.")
    }
    sizes: dict[str, Any] = {key: config[key] for key in ("img_size", "embed_dim", "depths", "num_heads")}
    theirs = SwinTransformer(window_size=config["window_size"], num_classes=0, drop_path_rate=0, **sizes)
    theirs.load_state_dict(checkpoint_filter_fn({k: v for k, v in state.items() if k != "mask_token"}, theirs))
    model: Any = create_encoder("mixmae_swin_nano", window_size=(4, 4, 4, 2), **sizes).eval()
    converted = swin(state)
    assert converted.left_out.count("mask_token") == 1
    model.load_state_dict(model.fit_state_dict(state))
    model.positions.zero_()
    images = load_file(file)["images"]
    with torch.no_grad():
        torch.testing.assert_close(model(images), unshifted(theirs).forward_features(images), atol=1e-5, rtol=1e-5)


def test_positions_of_class_tokens_are_left_out_where_there_are_any() -> None:
    patches = torch.randn(1, 16, 8)
    for token, positions in {
        "cls_token": torch.cat([torch.zeros(1, 1, 8), patches], dim=1),
        "no_embed_class": patches,
    }.items():
        state: dict[str, Tensor] = {"pos_embed": positions, "cls_token": torch.zeros(1, 1, 8), "blocks.5.x": patches}
        converted = vit(state, 3)
        assert torch.equal(converted.state["pos_embed.weight"], patches), token
        assert set(converted.state) == {"pos_embed.weight", "stages.1.blocks.2.x"}
        assert converted.left_out == ("cls_token",)


def test_own_names_stay() -> None:
    for name in ("swin", "vit", "pvt", "twins", "resnet"):
        with torch.device("meta"):
            model = timm.create_model(f"mixmae_{name}_nano", num_classes=3)
        converted = model.convert(model.state_dict())
        assert list(converted.state) == list(model.state_dict())
        assert not converted.left_out
        assert all(re.fullmatch(r"(stages|patch_embed|pos_embed|stem|norm|head)\..*", key) for key in converted.state)
