"""MAE against its authors' code (tests/data/README.md), and what our reading of it on Swin means."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mixmae.models import MAE, create_encoder
from mixmae.models.encoders.swin import Swin
from mixmae.models.encoders.vit import ViT, ViTStage
from tests.helpers import ROOT

FILE = ROOT / "tests" / "data" / "mae_tiny.safetensors"


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_file(FILE)


@pytest.fixture(scope="module")
def model(reference: dict[str, Tensor]) -> MAE:
    with safe_open(FILE, "pt") as file:
        config = json.loads(file.metadata()["config"])
    encoder = ViT(
        img_size=config["img_size"],
        num_classes=0,
        global_pool="",
        embed_dim=config["embed_dim"],
        depth=4,
        num_heads=config["num_heads"],
    )
    for stage in encoder.stages[config["depth"] :]:  # four stages are the fewest that ours has
        assert isinstance(stage, ViTStage)
        del stage.blocks[:]
    model = MAE(
        encoder,
        config["mask_ratio"],
        decoder_dim=config["decoder_embed_dim"],
        decoder_depth=config["decoder_depth"],
        decoder_num_heads=config["decoder_num_heads"],
    )
    state = {name.removeprefix("state."): value for name, value in reference.items() if name.startswith("state.")}
    positions = state.pop("decoder_pos_embed")
    torch.testing.assert_close(model.decoder.positions, positions[0, 1:], atol=1e-6, rtol=0)
    assert not positions[0, 0].any()
    assert not state["pos_embed"][0, 0].any()
    fitted = encoder.fit_state_dict({name: value for name, value in state.items() if not name.startswith("decoder")})
    model.load_state_dict(
        {f"encoder.{name}": value for name, value in fitted.items() if name != "mask_token"}
        | {f"decoder.{name.removeprefix('decoder_')}": v for name, v in state.items() if name.startswith("decoder")}
        | {"class_token": state["cls_token"], "decoder.mask_token": state["mask_token"]}
    )
    return model


def test_numbers_are_those_of_its_authors(model: MAE, reference: dict[str, Tensor]) -> None:
    images, order = reference["images"], reference["noise"].argsort(dim=1)
    features = model.encoder.forward_kept(images, order[:, : model.num_kept], model.class_token)
    torch.testing.assert_close(features, reference["latent"], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.predict(images, order), reference["prediction"], atol=1e-5, rtol=0)
    loss = model(images, order)
    assert abs(loss.item() - reference["loss"].item()) < 1e-5
    loss.backward()
    names = {
        "blocks.1.attn.qkv.weight": "encoder.stages.1.blocks.0.attn.qkv.weight",
        "cls_token": "class_token",
        "decoder_pred.bias": "decoder.pred.bias",
        "mask_token": "decoder.mask_token",
        "patch_embed.proj.weight": "encoder.patch_embed.proj.weight",
    }
    parameters = dict(model.named_parameters())
    for theirs, ours in names.items():
        expected, actual = reference[f"grad.{theirs}"], parameters[ours].grad
        assert actual is not None
        assert (actual - expected).norm() / expected.norm() < 1e-4, ours


@pytest.mark.parametrize("name", ["mixmae_vit_nano", "mixmae_swin_nano"])
def test_kept_cells_are_encoded_as_a_group_that_others_are_kept_from(name: str) -> None:
    torch.manual_seed(0)
    encoder = create_encoder(name, **({} if "vit" in name else {"window_size": (8, 4, 8, 4)}))
    images, cells = torch.randn(3, 3, 128, 128), encoder.grid[0] * encoder.grid[1]
    kept = torch.randperm(cells)[None, : cells // 4]
    groups = torch.ones(cells, dtype=torch.long).scatter(0, kept[0], 0).view(encoder.grid)
    expected = encoder(images, groups).flatten(1, 2)[:, kept[0]]
    given = kept if encoder.keep_map == "micro_batch" else kept.expand(3, -1)
    actual = encoder.forward_kept(images, given)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad(x.square().mean(), list(encoder.parameters())) for x in (actual, expected)]
    for ours, masked in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, masked, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("name", "kept"), [("mixmae_vit_base", 49), ("mixmae_swin_base_w14", 12)])
def test_dropped_tokens_cost_nothing(name: str, kept: int) -> None:
    """MAE's encoder takes a quarter of ViT's operations, but for patches that are embedded and then dropped."""
    with torch.device("meta"):
        model = MAE(create_encoder(name))
        images, order = torch.empty(2, 3, 224, 224), torch.zeros(2, model.num_cells).long()
        with FlopCounterMode(display=False) as whole:
            model.encoder(images)
        with FlopCounterMode(display=False) as part:
            model.encoder.forward_kept(images, order[:, :kept])
    assert model.num_kept == kept
    share = part.get_total_flops() / whole.get_total_flops()
    assert 0.9 * kept / model.num_cells < share < 1.1 * kept / model.num_cells


def test_what_keeps_cannot_be_had_is_refused() -> None:
    with torch.device("meta"):
        for name, family in (
            ("mixmae_resnet_nano", "ResNet"),
            ("mixmae_pvt_nano", "PVT"),
            ("mixmae_twins_nano", "Twins"),
        ):
            with pytest.raises(ValueError, match=f"{family} cannot leave out"):
                MAE(create_encoder(name))
        for ratio in (0.0, 1.0):
            with pytest.raises(ValueError, match=f"mask_ratio is {ratio}"):
                MAE(create_encoder("mixmae_vit_nano"), ratio)


def test_windows_have_no_place_for_a_class_token() -> None:
    with torch.device("meta"):
        model = MAE(create_encoder("mixmae_swin_nano"))
    assert isinstance(model.encoder, Swin)
    assert model.class_token is None
