"""SimMIM against its authors' code (tests/data/README.md): their encoder is timm's Swin, the rest is ours."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from mixmae.models import SimMIM, create_encoder
from mixmae.models.encoders.contract import Encoder, MapEdit, edit_of
from tests.helpers import ROOT

FILE = ROOT / "tests" / "data" / "simmim_tiny.safetensors"


class TimmSwin(Encoder):
    """timm's Swin, of shifted windows, as an encoder of ours."""

    first_conv = "swin.patch_embed.proj"
    grid = (2, 2)
    feature_info = [{"reduction": 4}]  # noqa: RUF012

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        sizes = ("img_size", "patch_size", "embed_dim", "depths", "num_heads", "window_size")
        self.swin = SwinTransformer(**{key: config[key] for key in sizes}, num_classes=0, drop_path_rate=0)
        self.num_features, self.edit_dims = self.swin.num_features, (config["embed_dim"],)

    def forward(
        self,
        images: Tensor,
        groups: Tensor | None = None,
        num_groups: int | None = None,
        edit: MapEdit | None = None,
    ) -> Tensor:
        x = edit_of(edit, 1)(self.swin.patch_embed(images))
        return self.swin.norm(self.swin.layers(x))

    def stage_blocks(self, stage: int) -> Sequence[nn.Module]:
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True, stages: Sequence[int] | None = None) -> None:
        raise NotImplementedError

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        raise NotImplementedError

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        raise NotImplementedError


def names_of_timm(name: str) -> str:
    """timm has a stage's merging at its beginning, SimMIM at the end of the one before."""
    return re.sub(r"layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample", name)


def test_numbers_are_those_of_its_authors() -> None:
    with safe_open(FILE, "pt") as file:
        config = json.loads(file.metadata()["config"])
    reference = load_file(FILE)
    encoder = TimmSwin(config)
    model = SimMIM(encoder, mask_patch_size=config["mask_cell"])
    state = {name.removeprefix("state."): value for name, value in reference.items() if name.startswith("state.")}
    theirs = {names_of_timm(k.removeprefix("encoder.")): v for k, v in state.items() if k.startswith("encoder.")}
    own: dict[str, Tensor] = {f"encoder.swin.{name}": value for name, value in theirs.items() if name != "mask_token"}
    own |= {"mask_token": theirs["mask_token"], "decoder.bias": state["decoder.0.bias"]}
    own["decoder.weight"] = state["decoder.0.weight"].flatten(1)
    missing, unexpected = model.load_state_dict(own, strict=False)
    assert not [name for name in missing if not name.endswith("relative_position_index")]
    assert not [name for name in unexpected if not name.endswith("attn_mask")]

    images, mask = reference["images"], reference["mask_cells"].bool()
    torch.testing.assert_close(model.predict(images, mask), reference["reconstruction"], atol=1e-5, rtol=0)
    loss = model(images, mask)
    assert abs(loss.item() - reference["loss"].item()) < 1e-5
    loss.backward()
    for gradient, expected in (
        (model.decoder.bias.grad, reference["grad.decoder.0.bias"]),
        (model.mask_token.grad, reference["grad.encoder.mask_token"]),
        (encoder.swin.patch_embed.proj.weight.grad, reference["grad.encoder.patch_embed.proj.weight"]),
    ):
        assert isinstance(gradient, Tensor)
        assert (gradient - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("name", ["mixmae_swin_nano", "mixmae_vit_nano", "mixmae_twins_nano", "mixmae_resnet_nano"])
def test_masked_pixels_are_not_seen(name: str) -> None:
    """Also not by a stem whose kernels reach into masked squares; visible ones are seen."""
    model = SimMIM(create_encoder(name))
    images, (mask,) = torch.randn(2, 3, 128, 128), model.draw(2, torch.Generator().manual_seed(0))
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    with torch.no_grad():
        expected = model.predict(images, mask)
        assert torch.equal(model.predict(torch.where(hidden, 5.0, images), mask), expected)
        assert not torch.equal(model.predict(torch.where(hidden, images, 5.0), mask), expected)


def test_the_mask_covers_the_papers_share_of_squares() -> None:
    with torch.device("meta"):
        model = SimMIM(create_encoder("mixmae_swin_base", img_size=192, window_size=(6, 6, 6, 6)))
    (mask,) = model.draw(8, torch.Generator().manual_seed(0))
    assert mask.shape == (8, 6, 6)
    assert mask.flatten(1).sum(1).tolist() == [22] * 8  # 0.6 of 36, rounded up
    assert len({tuple(row.flatten().tolist()) for row in mask}) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_patch_size": 48}, "mask_patch_size 48: expected a multiple of the encoder's 4 px tokens"),
        ({"mask_patch_size": 2}, "mask_patch_size 2"),
        ({"mask_ratio": 0.0}, "mask_ratio is 0.0, which masks 0 of 16 cells"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0"),
    ],
)
def test_masks_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=re.escape(message)):
        SimMIM(create_encoder("mixmae_swin_nano"), **options)
