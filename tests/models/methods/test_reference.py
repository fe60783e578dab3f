"""One forward and backward pass of the authors' implementation (tests/data/README.md) against ours."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mixmae.models import MixMAE
from mixmae.models.encoders.swin import Swin
from mixmae.models.methods.mixing import mix_images
from mixmae.trainer.export.import_mixmim import convert
from tests.helpers import ROOT

FILE = ROOT / "tests" / "data" / "mixmim_tiny.safetensors"


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_file(FILE)


@pytest.fixture(scope="module")
def model(reference: dict[str, Tensor]) -> MixMAE:
    with safe_open(FILE, "pt") as file:
        config = json.loads(file.metadata()["config"])
    encoder = Swin(
        num_classes=0,
        global_pool="",
        embed_dim=config["embed_dim"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        window_size=config["window_size"],
    )
    sizes = {key: config[key] for key in ("decoder_dim", "decoder_depth", "decoder_num_heads")}
    model = MixMAE(encoder, num_images=2, **sizes)
    state = {name.removeprefix("state."): value for name, value in reference.items() if name.startswith("state.")}
    encoder_state, decoder_state = convert(state)
    assert decoder_state is not None
    encoder.load_state_dict(encoder_state)
    model.decoder.load_state_dict(decoder_state)
    return model


@pytest.fixture(scope="module")
def images(reference: dict[str, Tensor]) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (reference["images_uint8"] / 255 - mean[:, None, None]) / std[:, None, None]


@pytest.fixture(scope="module")
def mix(reference: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return reference["mask"].long(), torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])


def test_encoded_features(
    model: MixMAE, images: Tensor, mix: tuple[Tensor, Tensor], reference: dict[str, Tensor]
) -> None:
    groups, partners = mix
    mixed = mix_images(images, groups, partners)
    for num_groups in (None, 2):
        features = model.encoder(mixed, groups, num_groups)
        torch.testing.assert_close(features.flatten(1, 2), reference["encoded"], atol=1e-4, rtol=0)


def test_reconstruction(
    model: MixMAE, images: Tensor, mix: tuple[Tensor, Tensor], reference: dict[str, Tensor]
) -> None:
    predictions, _ = model.predict(images, *mix)
    torch.testing.assert_close(
        predictions.flatten(0, 1)[..., :32], reference["reconstruction_first32"], atol=1e-4, rtol=0
    )


def test_pooled_features_of_unmixed_images(model: MixMAE, images: Tensor, reference: dict[str, Tensor]) -> None:
    pooled = model.encoder(images).mean((1, 2))
    torch.testing.assert_close(pooled, reference["pooled_features_unmixed"], atol=1e-4, rtol=0)


def test_loss_and_gradients(
    model: MixMAE, images: Tensor, mix: tuple[Tensor, Tensor], reference: dict[str, Tensor]
) -> None:
    model.zero_grad()
    loss = model(images, *mix)
    assert abs(loss.item() - reference["loss"].item()) < 1e-5
    loss.backward()
    gradients = convert(
        {name.removeprefix("grad."): value for name, value in reference.items() if name.startswith("grad.")}
    )
    expected = {f"encoder.{k}": v for k, v in gradients[0].items()} | {
        f"decoder.{k}": v for k, v in (gradients[1] or {}).items()
    }
    assert len(expected) == 7
    parameters = dict(model.named_parameters())
    for name, gradient in expected.items():
        actual = parameters[name].grad
        assert actual is not None
        assert (actual - gradient).norm() / gradient.norm() < 1e-4, name


def test_loss_does_not_depend_on_one_map_being_given_per_sample(
    model: MixMAE, images: Tensor, mix: tuple[Tensor, Tensor], reference: dict[str, Tensor]
) -> None:
    groups, partners = mix
    loss = model(images, groups.expand(4, 7, 7), partners)
    assert abs(loss.item() - reference["loss"].item()) < 1e-5
