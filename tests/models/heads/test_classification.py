"""The classifier against the authors' fine-tuning model (tests/data/README.md) and timm's mixup."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data import Mixup
from torch import Tensor

from mixmae.models.encoders.swin import Swin
from mixmae.models.heads.classification import Classifier
from mixmae.models.heads.mixup import MixSettings, draw_mix, mix_images
from mixmae.trainer.export.import_mixmim import convert
from tests.helpers import ROOT

FILE = ROOT / "tests" / "data" / "mixmim_finetune_tiny.safetensors"


def own_names(released: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Parameters or gradients of the reference under our names."""
    part = {name.removeprefix(prefix): value for name, value in released.items() if name.startswith(prefix)}
    return convert(part)[0]


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_file(FILE)


@pytest.fixture(scope="module")
def classifier(reference: dict[str, Tensor]) -> Classifier:
    with safe_open(FILE, "pt") as file:
        config = json.loads(file.metadata()["config"])
    sizes = {key: config[key] for key in ("embed_dim", "depths", "num_heads", "window_size")}
    classifier = Classifier(Swin(num_classes=0, global_pool="", **sizes), config["num_classes"])
    classifier.encoder.load_state_dict(own_names(reference, "state."))
    return classifier.eval()


@pytest.fixture(scope="module")
def images(reference: dict[str, Tensor]) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (reference["images_uint8"] / 255 - mean[:, None, None]) / std[:, None, None]


def test_logits_loss_and_gradients(classifier: Classifier, images: Tensor, reference: dict[str, Tensor]) -> None:
    torch.testing.assert_close(classifier(images), reference["logits"], atol=1e-5, rtol=1e-5)
    loss = classifier(images, reference["targets"])
    assert abs(loss.item() - reference["loss"].item()) < 1e-5
    loss.backward()
    expected = own_names(reference, "grad.")
    assert len(expected) == 4
    parameters = dict(classifier.encoder.named_parameters())
    for name, gradient in expected.items():
        actual = parameters[name].grad
        assert actual is not None
        assert (actual - gradient).norm() / gradient.norm() < 1e-4, name


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_mixing_is_timms(classifier: Classifier, mixup: float, cutmix: float) -> None:
    """The same share and box, drawn by ours, blended by theirs."""
    theirs = Mixup(mixup, cutmix, label_smoothing=0.1, num_classes=10)
    smoothed = Classifier(classifier.encoder, 10, label_smoothing=0.1, mixes=True)
    images, labels = torch.randn(4, 3, 224, 224), torch.tensor([1, 7, 7, 0])
    for seed in range(5):
        mix = draw_mix(MixSettings(mixup, cutmix), (224, 224), torch.Generator().manual_seed(seed))
        box, kept = [int(edge) for edge in mix[:4]], float(mix[6])
        theirs._params_per_batch = lambda kept=kept: (kept, cutmix > 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("timm.data.mixup.cutmix_bbox_and_lam", lambda *_, box=box, kept=kept, **__: (box, kept))
            mixed, targets = theirs(images.clone(), labels)
        torch.testing.assert_close(mix_images(images, mix), mixed, atol=1e-6, rtol=1e-5)
        own = smoothed.soft_targets(labels)
        torch.testing.assert_close(own.flip(0).lerp(own, mix[6]), targets, atol=1e-6, rtol=1e-5)


def test_draws_are_distributed_as_timms() -> None:
    """Shares that images keep: means and deviations of both, and how often a box is cut."""
    settings = MixSettings(mixup=0.8, cutmix=1.0, prob=0.9)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_mix(settings, (224, 224), generator) for _ in range(4000)])
    np.random.seed(0)
    theirs = Mixup(0.8, 1.0, prob=0.9, num_classes=10)
    expected = []
    for _ in range(4000):
        kept, is_cut = theirs._params_per_batch()
        if is_cut:
            from timm.data.mixup import cutmix_bbox_and_lam

            _, kept = cutmix_bbox_and_lam((2, 3, 224, 224), kept)
        expected.append((kept, is_cut))
    kept, cut = (torch.tensor(column, dtype=torch.float32) for column in zip(*expected, strict=True))
    own_cut = (drawn[:, 4] == 0) & (drawn[:, 5] == 1)
    assert abs(float(own_cut.float().mean() - cut.mean())) < 0.03
    for own, their in ((drawn[own_cut, 6], kept[cut == 1]), (drawn[~own_cut, 6], kept[cut == 0])):
        assert abs(float(own.mean() - their.mean())) < 0.03
        assert abs(float(own.std() - their.std())) < 0.03
