"""What timm's own tests ask of its models (tests/test_models.py there), of every encoder."""

from typing import Any, cast

import pytest
import timm
import torch
from timm.layers import get_channel_dim, get_spatial_dim
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from mixmae.models import MixMAE, create_encoder
from mixmae.trainer.engine.parameter_groups import parameter_groups

FAMILIES = ["swin", "vit", "pvt", "twins", "resnet"]
LARGER = ["mixmae_swin_base", "mixmae_swin_base_w14", "mixmae_vit_base", "mixmae_pvt_small", "mixmae_twins_small"]
LARGER += ["mixmae_resnet_50x1"]


@pytest.fixture(
    scope="module",
    params=[f"mixmae_{family}_nano" for family in FAMILIES] + [pytest.param(n, marks=pytest.mark.slow) for n in LARGER],
)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return timm.create_model(request.param, num_classes=10).eval()


def draw(model: Any, batch: int = 2) -> Tensor:
    return torch.randn(batch, *model.default_cfg["input_size"], generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_torchscript(model: Any) -> None:
    images = draw(model)
    expected = model(images)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(images), expected)
    assert {p.data_ptr() for p in scripted.parameters()} == {p.data_ptr() for p in model.parameters()}
    with pytest.raises(torch.jit.Error, match="the encoder is for"):
        scripted(images[:, :, :32])
    torch.testing.assert_close(model(images), expected)


@torch.no_grad()
def test_torchscript_of_a_model_around_it(model: Any) -> None:
    around = nn.Sequential(timm.create_model(model.default_cfg["architecture"], num_classes=3), nn.Softmax(-1)).eval()
    images = draw(model)
    expected = around(images)
    torch.testing.assert_close(torch.jit.script(around)(images), expected)


def test_feature_extraction_of_torchvision(model: Any) -> None:
    images = draw(model)
    nodes = {"stages.1": "second", "stages.3": "last", "head": "logits"}
    extractor = create_feature_extractor(model, nodes)
    with torch.no_grad():
        found = extractor(images)
        assert torch.equal(found["logits"], model(images))
        _, maps = model.forward_intermediates(images, output_fmt="NHWC")
        for name, expected in (("second", maps[1]), ("last", maps[3])):
            assert torch.equal(found[name], expected)
        scripted = torch.jit.script(extractor)
        torch.testing.assert_close(scripted(images)["logits"], found["logits"])
    model.train()
    training = create_feature_extractor(model, {"head": "logits"})
    training(images)["logits"].square().mean().backward()
    model.eval()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    model.zero_grad()


@torch.no_grad()
def test_default_cfg_says_what_the_model_gives(model: Any) -> None:
    images, facts = draw(model, 1), model.default_cfg
    rows, cols = get_spatial_dim(model.output_fmt)
    channels = get_channel_dim(model.output_fmt)
    features = model.forward_features(images)
    assert (features.shape[rows], features.shape[cols], features.shape[channels]) == (
        *facts["pool_size"],
        model.num_features,
    )
    names = model.state_dict()
    assert f"{facts['classifier']}.weight" in names
    assert f"{facts['first_conv']}.weight" in names
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)


@torch.no_grad()
def test_forward_intermediates(model: Any) -> None:
    images = draw(model)
    final, maps = model.forward_intermediates(images)
    assert torch.equal(final, model.forward_features(images))
    for facts, found in zip(model.feature_info, maps, strict=True):
        side = images.shape[-1] // facts["reduction"]
        assert found.shape == (2, facts["num_chs"], side, side)
    last, first = model.forward_intermediates(images, indices=[0])
    assert torch.equal(last, final)
    assert torch.equal(first[0], maps[0])
    stopped = model.forward_intermediates(images, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(stopped[0], maps[1])
    normed = model.forward_intermediates(images, indices=1, norm=True, output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(normed[0], final)
    model.set_grad_checkpointing()
    with torch.enable_grad():
        # Convolutions may round otherwise where gradients are wanted, which adds up over 50 of them.
        torch.testing.assert_close(model.forward_intermediates(images)[0], final, rtol=1e-5, atol=1e-4)
    model.set_grad_checkpointing(False)
    with pytest.raises(ValueError, match="expected NCHW or NHWC"):
        model.forward_intermediates(images, output_fmt="NLC")


@torch.no_grad()
def test_pruned_models_give_the_same_maps(model: Any) -> None:
    name, images = model.default_cfg["architecture"], draw(model, 1)
    whole = timm.create_model(name, features_only=True).eval()
    pruned = create_encoder(name).eval()
    pruned.load_state_dict({k.removeprefix("model."): v for k, v in whole.state_dict().items()}, strict=False)
    assert cast(Any, pruned).prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    assert len(cast(Any, pruned).stages) == 2
    for ours, theirs in zip(
        cast(Any, pruned).forward_intermediates(images, [0, 1], intermediates_only=True), whole(images), strict=False
    ):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_the_classifier_can_be_replaced_and_left_out(model: Any) -> None:
    other = timm.create_model(model.default_cfg["architecture"], num_classes=3).eval()
    images = draw(model, 1)
    features = other.forward_features(images)
    other.reset_classifier(0)
    assert other.num_classes == 0
    torch.testing.assert_close(other(images), features.mean((1, 2)), atol=1e-5, rtol=1e-4)
    other.reset_classifier(0, "")
    assert torch.equal(other(images), features)
    other.reset_classifier(7, "avg")
    assert other(images).shape == (1, 7)
    assert other.get_classifier().out_features == 7


def test_timm_decays_what_pretraining_decays(model: Any) -> None:
    name = model.default_cfg["architecture"]
    method = MixMAE(create_encoder(name), decoder_dim=32, decoder_depth=1, decoder_num_heads=2)
    encoder = method.encoder
    names = {parameter: key for key, parameter in encoder.named_parameters()}
    groups = create_optimizer_v2(encoder, "adamw", lr=1e-3, weight_decay=0.05).param_groups
    theirs = {names[parameter] for group in groups if group["weight_decay"] for parameter in group["params"]}
    ours = parameter_groups(method, 0.05, tuple(method.no_weight_decay()))
    decayed = {key for group in ours if group.weight_decay for key in group.names}
    assert theirs == {key.removeprefix("encoder.") for key in decayed if key.startswith("encoder.")}


@torch.no_grad()
def test_another_size_is_traced_and_scripted(model: Any) -> None:
    other = timm.create_model(model.default_cfg["architecture"], num_classes=3).eval()
    other.set_input_size(img_size=(64, 128))
    images = torch.randn(1, 3, 64, 128)
    torch.testing.assert_close(torch.jit.script(other)(images), other(images))


@pytest.mark.parametrize("argument", ["strict_img_size=False", "dynamic_img_size=True"])
def test_images_of_any_size_are_refused_in_words(model: Any, argument: str) -> None:
    key, _, value = argument.partition("=")
    name = model.default_cfg["architecture"]
    with pytest.raises(ValueError, match=f"{argument}: .* call set_input_size"):
        timm.create_model(name, **{key: value == "True"})
    with torch.device("meta"):
        timm.create_model(name, **{key: value != "True"})
    with pytest.raises(ValueError, match="images are 64x64 px"):
        model(torch.randn(1, 3, 64, 64))
