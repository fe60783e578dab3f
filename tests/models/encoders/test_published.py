"""Sizes as published, and known answers: timm's models and the authors' own, with random weights."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.layers import StdConv2d
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixmae.models import create_encoder
from mixmae.models.encoders.pvt import PVT
from mixmae.models.layers.cell_order import dense
from tests.helpers import ROOT

# Parameters without a head (M), and forward GMACs at 224 px where the family's paper, MixMAE's or timm's model card (of
# the classifier, for 448 px: a quarter) states them. Those of ResNet-50x3 count the standardisation of kernels, too.
TABLE = {
    "mixmae_pvt_tiny": (12.7, 1.9),
    "mixmae_pvt_small": (24.0, 3.8),
    "mixmae_pvt_medium": (43.7, 6.7),
    "mixmae_pvt_large": (60.9, 9.8),
    "mixmae_twins_small": (23.5, 2.9),
    "mixmae_twins_base": (55.3, 8.6),
    "mixmae_twins_large": (98.3, 15.1),
    "mixmae_vit_small": (21.7, 4.6),
    "mixmae_vit_base": (85.8, 17.5),
    "mixmae_vit_large": (303.3, 61.3),
    "mixmae_resnet_50x1": (23.5, None),
    "mixmae_resnet_50x3": (211.0, 145.7 / 4),
    "mixmae_resnet_101x3": (382.0, None),
}
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "mixmae_twins_small": ("twins_svt_small", {}),
    "mixmae_twins_base": ("twins_svt_base", {}),
    "mixmae_twins_large": ("twins_svt_large", {}),
    "mixmae_vit_small": ("vit_small_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "mixmae_vit_base": ("vit_base_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "mixmae_vit_large": ("vit_large_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "mixmae_resnet_50x1": ("resnetv2_50x1_bit", {}),
    "mixmae_resnet_50x3": ("resnetv2_50x3_bit", {}),
    "mixmae_resnet_101x3": ("resnetv2_101x3_bit", {}),
}
OF_THE_PAPERS = {"mixmae_pvt_large", "mixmae_twins_large", "mixmae_vit_base", "mixmae_resnet_50x3"}


def of_all(names: Iterable[str]) -> list[Any]:
    """Parameters for a test: the sizes that the papers pretrain, and the others in the slow tier."""
    return [pytest.param(name, marks=() if name in OF_THE_PAPERS else pytest.mark.slow) for name in names]


def macs_of(model: nn.Module, *inputs: torch.Tensor) -> float:
    """GMACs of a forward pass, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", of_all(TABLE))
def test_parameters_and_macs_are_those_published(name: str) -> None:
    parameters, macs = TABLE[name]
    with torch.device("meta"):
        encoder = create_encoder(name)
        images, groups = torch.empty(1, 3, 224, 224), torch.zeros(encoder.grid, dtype=torch.long)
        unmixed, mixed = macs_of(encoder, images), macs_of(encoder, images, groups)
    assert sum(parameter.numel() for parameter in encoder.parameters()) / 1e6 == pytest.approx(parameters, rel=5e-3)
    if macs is not None:
        assert unmixed == pytest.approx(macs, rel=1e-2, abs=0.05)  # they are rounded to 0.1
    # Keeping groups apart costs nothing: attention behind a mask, convolutions of what is seen.
    assert mixed == pytest.approx(unmixed, rel=5e-3)


@pytest.mark.parametrize("name", of_all(TIMM))
def test_weights_of_timm_fit_and_take_as_many_operations(name: str) -> None:
    size, options = TIMM[name]
    with torch.device("meta"):
        ours, theirs = timm.create_model(name, num_classes=1000), timm.create_model(size, **options)
        ours.load_state_dict(ours.fit_state_dict(theirs.state_dict()))
        macs = [macs_of(model, torch.empty(1, 3, 224, 224)) for model in (ours, theirs)]
    assert macs[0] == pytest.approx(macs[1], rel=5e-3)


# What makes timm's model as small as ours. ResNets are compared whole, on small images, in fp64: through fifty layers
# sums in another order differ by more than what is to be shown.
SMALL: dict[str, tuple[str, int, dict[str, Any]]] = {
    "mixmae_twins_nano": (
        "mixmae_twins_small",
        224,
        {"embed_dims": [32, 64, 96, 128], "depths": [2, 1, 2, 2], "num_heads": [1, 2, 3, 4]},
    ),
    "mixmae_vit_nano": ("mixmae_vit_small", 128, {"img_size": 128, "embed_dim": 64, "depth": 4, "num_heads": 2}),
    "mixmae_resnet_50x1": ("mixmae_resnet_50x1", 64, {}),
}


@pytest.mark.parametrize("name", SMALL)
def test_unmixed_logits_are_those_of_timm(name: str) -> None:
    torch.manual_seed(0)
    size, img_size, sizes = SMALL[name]
    theirs, options = TIMM[size]
    expected = timm.create_model(theirs, num_classes=7, **options, **sizes).double().eval()
    for module in expected.modules():
        if isinstance(module, StdConv2d):
            module.eps = 1e-10  # as in BiT; timm's 1e-8 shows
    ours = timm.create_model(name, img_size=img_size, num_classes=7).double().eval()
    ours.load_state_dict(ours.fit_state_dict(expected.state_dict()))
    images = torch.randn(2, 3, img_size, img_size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), expected(images), atol=1e-5, rtol=1e-5)


def test_class_tokens_of_timm_are_left_out() -> None:
    with torch.device("meta"):
        ours = timm.create_model("mixmae_vit_small", img_size=256, num_classes=1000)
        ours.load_state_dict(ours.fit_state_dict(timm.create_model("vit_small_patch16_224").state_dict()))


def test_pvt_is_that_of_its_authors() -> None:
    file = ROOT / "tests" / "data" / "pvt_tiny.safetensors"
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    reference = load_file(file)
    state = {name.removeprefix("state."): value for name, value in reference.items() if name.startswith("state.")}
    sizes = {key: config[key] for key in ("img_size", "embed_dims", "depths", "num_heads", "mlp_ratios", "num_classes")}
    model = PVT(**sizes).eval()
    model.load_state_dict(model.fit_state_dict(state))
    with torch.no_grad():
        maps = model.forward_intermediates(reference["images"], intermediates_only=True)
        assert isinstance(maps, list)
        for number, actual in enumerate(maps[:3], start=1):
            torch.testing.assert_close(actual, reference[f"stage{number}"], atol=1e-5, rtol=1e-5)
        # The fourth stage has a class token there: it is put before ours.
        stage: Any = model.stages[3]
        tokens = stage.pos_embed(stage.patch_embed(maps[2].permute(0, 2, 3, 1))).flatten(1, 2)
        class_token = (state["cls_token"] + state["pos_embed4"][:, :1]).expand(len(tokens), -1, -1)
        tokens = torch.cat([class_token, tokens], dim=1)
        for block in model.stage_blocks(4):
            tokens = block(tokens, dense(tokens.shape[1]))
        logits = model.head.fc(model.norm(tokens))[:, 0]
        torch.testing.assert_close(logits, reference["logits_from_cls_token"], atol=1e-5, rtol=1e-5)


def test_positions_of_no_square_cannot_be_resized() -> None:
    oblong, square = create_encoder("mixmae_vit_nano", img_size=(128, 64)), create_encoder("mixmae_vit_nano")
    with pytest.raises(ValueError, match="32 tokens are neither of a square"):
        square.fit_state_dict(oblong.state_dict())
