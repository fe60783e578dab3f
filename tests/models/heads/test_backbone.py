"""The backbone against timm's feature extraction, and against attention and resizing written out plainly."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmae.models import create_encoder
from mixmae.models.encoders.swin import Swin
from mixmae.models.encoders.swin_stage import SwinStage
from mixmae.models.heads.backbone import Backbone
from mixmae.trainer.engine.layer_decay import layer_decay
from mixmae.trainer.export.encoder_directory import write_encoder_directory
from mixmae.trainer.export.initial_weights import initialise_backbone

HIERARCHICAL = [f"mixmae_{family}_nano" for family in ("swin", "pvt", "twins", "resnet")]
WIDE: dict[str, Any] = {"window_size": (8, 8, 4, 4), "wide_window": 8, "wide_blocks": (2, 3)}


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_maps_are_those_of_timm_behind_a_norm(name: str) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(name, features_only=True, img_size=96).eval()
    backbone = Backbone(create_encoder(name, img_size=96)).eval()
    backbone.encoder.load_state_dict(
        {key.removeprefix("model."): value for key, value in theirs.state_dict().items()}, strict=False
    )
    for norm in backbone.norms:
        nn.init.normal_(norm.get_parameter("weight"))
        nn.init.normal_(norm.get_parameter("bias"))
    images = torch.randn(2, 3, 96, 96)
    plain = Backbone(create_encoder(name, img_size=96), out_norm=False).eval()
    plain.encoder.load_state_dict(backbone.encoder.state_dict())
    for found, bare, x, norm in zip(backbone(images), plain(images), theirs(images), backbone.norms, strict=True):
        assert torch.equal(bare, x)
        mean, var = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
        scale, shift = (norm.get_parameter(key)[:, None, None] for key in ("weight", "bias"))
        expected = (x - mean) / (var + 1e-5).sqrt() * scale + shift
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert backbone.channels == theirs.feature_info.channels()
    assert backbone.strides == theirs.feature_info.reduction()


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_every_parameter_learns_at_a_size_that_is_no_square(name: str) -> None:
    backbone = Backbone(create_encoder(name, img_size=(64, 160)))
    maps = backbone(torch.randn(2, 3, 64, 160))
    assert [x.shape[2:] for x in maps] == [(64 // s, 160 // s) for s in (4, 8, 16, 32)]
    torch.stack([(x * torch.randn_like(x)).sum() for x in maps]).sum().backward()
    assert [key for key, parameter in backbone.named_parameters() if parameter.grad is None] == []


def test_a_plain_vision_transformer_is_refused() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=r"ViT has maps of stride 16, 16, 16, 16; expected"):
        Backbone(create_encoder("mixmae_vit_nano"))


def attention_written_out(stage: SwinStage, x: Tensor) -> Tensor:
    """The blocks of a stage on a map [B, H, W, C]: all pairs of tokens, hidden where a window parts them."""
    height, width = stage.grid
    row, col = (axis.flatten() for axis in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    tokens = x.flatten(1, 2)
    for number, block in enumerate(stage.blocks, start=1):
        part: Any = block
        window = 8 if number in WIDE["wide_blocks"] else 4
        apart = (row[:, None] // window != row // window) | (col[:, None] // window != col // window)
        offset = (row[:, None] - row + window - 1) * (2 * window - 1) + col[:, None] - col + window - 1
        bias = part.attn.relative_position_bias_table[offset.clamp(0, (2 * window - 1) ** 2 - 1)].permute(2, 0, 1)
        q, k, v = part.attn.qkv(part.norm1(tokens)).unflatten(2, (3, part.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(2, 3) * part.attn.scale + bias).masked_fill(apart, -torch.inf)
        tokens = tokens + part.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        tokens = tokens + part.mlp(part.norm2(tokens))
    return tokens.unflatten(1, stage.grid)


def test_blocks_of_stage_3_can_have_a_window_of_their_own() -> None:
    torch.manual_seed(0)
    encoder = create_encoder("mixmae_swin_nano", img_size=256, depths=(1, 1, 4, 1), **WIDE)
    assert isinstance(encoder, Swin)
    stage = encoder.stages[2]
    assert isinstance(stage, SwinStage)
    x = torch.randn(2, 32, 32, 64)
    torch.testing.assert_close(stage(x), attention_written_out(stage, stage.downsample(x)), atol=1e-5, rtol=1e-4)
    encoder.set_input_size(128)
    assert (encoder.wide_window, stage.window, stage.grid) == (8, 8, (8, 8))
    assert encoder(torch.randn(1, 3, 128, 128)).shape == (1, 4, 4, 256)


def test_wide_windows_keep_groups_and_kept_cells_apart() -> None:
    torch.manual_seed(0)
    encoder = create_encoder("mixmae_swin_nano", depths=(1, 1, 4, 1), **WIDE).eval()
    images, groups = torch.randn(2, 3, 128, 128), torch.randint(0, 2, (4, 4))
    other = torch.where(groups.repeat_interleave(32, 0).repeat_interleave(32, 1) == 0, images, torch.randn_like(images))
    features, kept = encoder(images, groups), groups.flatten() == 0
    assert torch.equal(features.flatten(1, 2)[:, kept], encoder(other, groups).flatten(1, 2)[:, kept])
    alone = encoder.forward_kept(images, kept.nonzero().T)
    torch.testing.assert_close(alone, features.flatten(1, 2)[:, kept], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "advice"),
    [
        ({"wide_window": 24}, "wide_window 24 does not divide stage 3's token grid of 32x32; 32 would"),
        ({"wide_window": 32, "wide_blocks": (6, 19)}, "stage 3 has no block 19; expected numbers from 1 to 18"),
    ],
)
def test_wide_windows_that_do_not_fit_are_refused(sizes: dict[str, Any], advice: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=advice):
        create_encoder("mixmae_swin_base_w14", img_size=512, **sizes)


def test_pretrained_weights_are_resized_to_the_windows_of_a_detector(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"depths": (1, 1, 2, 1)}
    pretrained = create_encoder("mixmae_swin_nano", **sizes)
    state = pretrained.state_dict()
    write_encoder_directory(
        tmp_path / "encoder", "mixmae_swin_nano", {"img_size": 128, **sizes}, state, None, {}, {}, "card"
    )
    large = Backbone(
        create_encoder(
            "mixmae_swin_nano",
            img_size=512,
            window_size=(16,) * 4,
            wide_window=32,
            wide_blocks=(2,),
            pretrain_img_size=128,
        )
    )
    initialise_backbone(large.encoder, tmp_path / "encoder")
    tables = 0
    for name, loaded in large.encoder.state_dict().items():
        expected = state[name]
        if name.endswith("relative_position_bias_table"):
            old, new = round(len(expected) ** 0.5), round(len(loaded) ** 0.5)
            image = expected.T.unflatten(1, (old, old))[None]
            expected = F.interpolate(image, (new, new), mode="bicubic").flatten(2)[0].T
            tables += 1
        torch.testing.assert_close(loaded, expected)
    assert tables == 5
    assert large.encoder.state_dict()["stages.2.blocks.1.attn.relative_position_bias_table"].shape == (63**2, 4)


def test_the_norms_learn_at_the_full_rate() -> None:
    with torch.device("meta"):
        backbone = Backbone(create_encoder("mixmae_swin_nano"))
    scale_of = layer_decay(backbone.encoder, 0.5, "standard", "encoder.")
    rates = {name: scale_of(name) for name, _ in backbone.named_parameters()}
    assert {rate for name, rate in rates.items() if name.startswith("norms.")} == {1.0}
    assert rates["encoder.stages.3.blocks.0.mlp.fc1.weight"] == 0.5
    assert rates["encoder.patch_embed.proj.weight"] == 0.5**6
