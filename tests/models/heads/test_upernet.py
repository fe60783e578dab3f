"""UperNet's heads against transformers', which follow mmsegmentation's; the loss; sizes against the paper's."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mixmae.models import create_encoder
from mixmae.models.heads.backbone import Backbone
from mixmae.models.heads.upernet import ConvNorm, PixelClassifier, Segmenter, UperNetHead

CLASSES = 7
REFERENCE = Path(__file__).parents[2] / "data" / "upernet_tiny.safetensors"
OUR_NAMES = [
    ("decode_head.psp_modules.", "head.pyramid_pooling.branches."),
    ("decode_head.bottleneck", "head.pyramid_pooling.bottleneck"),
    ("decode_head.lateral_convs", "head.lateral"),
    ("decode_head.fpn_convs", "head.smooth"),
    ("decode_head.fpn_bottleneck", "head.fuse"),
    ("decode_head.classifier", "head.classify.1"),
    ("auxiliary_head.convs.0", "auxiliary.0"),
    ("auxiliary_head.classifier", "auxiliary.1.1"),
    (".conv.", ".0."),
    (".batch_norm.", ".1."),
]
"""Parts of transformers' names and of ours, beside them."""


def segmenter(side: int = 96) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(Backbone(create_encoder("mixmae_swin_nano", img_size=side)), CLASSES, width=24)


def without_dropout(model: nn.Module) -> None:
    """In training; transformers' heads have none."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout2d):
            module.eval()


def test_heads_compute_what_transformers_do() -> None:
    """The same weights give the same logits and running statistics, in tests and in training."""
    with safe_open(REFERENCE, framework="pt") as file:
        reference = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    widths, classes = config["widths"], config["classes"]
    auxiliary = nn.Sequential(ConvNorm(widths[2], 256, 3), PixelClassifier(256, classes))
    heads = nn.ModuleDict({"head": UperNetHead(widths, config["width"], classes), "auxiliary": auxiliary})
    heads.load_state_dict(ours(reference, "state."))
    maps = [reference[f"map{level}"] for level in range(4)]
    for mode, begin in (("eval", nn.Module.eval), ("train", without_dropout)):
        begin(heads)
        with torch.no_grad():
            found = {"decode_head": heads["head"](maps), "auxiliary_head": heads["auxiliary"](maps[2])}
        for name, logits in found.items():
            torch.testing.assert_close(logits, reference[f"{mode}.{name}"], atol=1e-5, rtol=1e-5)
    state = heads.state_dict()
    for name, value in ours(reference, "after.").items():
        torch.testing.assert_close(state[name], value)


def ours(reference: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, by our names."""
    found = {}
    for theirs, value in reference.items():
        if theirs.startswith(prefix):
            name = theirs.removeprefix(prefix)
            for part, own in OUR_NAMES:
                name = name.replace(part, own)
            found[name] = value
    return found


def test_the_loss_is_the_mean_over_all_pixels_and_teaches_every_parameter() -> None:
    model = segmenter()
    without_dropout(model)
    images, labels = torch.randn(3, 3, 96, 96), torch.randint(0, CLASSES, (3, 96, 96))
    labels[0, :40] = 255
    maps = model.backbone(images)
    losses = []
    for logits in (model.head(maps), model.auxiliary(maps[2])):
        full = F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)
        right = full.log_softmax(1).gather(1, labels.clamp(max=CLASSES - 1)[:, None])[:, 0]
        losses.append(-(right * (labels != 255)).sum() / labels.numel())
    loss = model(images, labels.to(torch.uint8))
    torch.testing.assert_close(loss, losses[0] + 0.4 * losses[1], atol=1e-5, rtol=1e-4)
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_without_labels_there_are_logits_of_every_pixel() -> None:
    model = segmenter(64).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = model(images)
        torch.testing.assert_close(model(images[1:]), logits[1:], atol=1e-5, rtol=1e-4)
    assert (logits.shape, logits.dtype) == ((2, CLASSES, 64, 64), torch.float32)


@pytest.mark.parametrize(("name", "millions", "gmacs"), [("swin_base_w14", 122, 302), ("swin_large", 236, None)])
def test_sizes_are_those_of_the_papers_table_4(name: str, millions: float, gmacs: float | None) -> None:
    """But for the 460 GMACs of Swin-L, of which 409 can be found."""
    with torch.device("meta"):
        encoder = create_encoder(f"mixmae_{name}", img_size=512, window_size=(16,) * 4, wide_window=32)
        model = Segmenter(Backbone(encoder), num_classes=150).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 512, 512))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-2)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs or 409, rel=1e-2)
