"""UperNet against a second implementation, written from mmsegmentation's configuration of BEiT's recipes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mixmae.models import create_encoder
from mixmae.models.heads.backbone import Backbone
from mixmae.models.heads.upernet import Segmenter

CLASSES = 7


def segmenter(side: int = 96) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(Backbone(create_encoder("mixmae_swin_nano", img_size=side)), CLASSES, width=24)


def conv_bn_relu(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    kernel = state[f"{name}.0.weight"]
    x = F.conv2d(x, kernel, padding=(kernel.shape[2] - 1) // 2)
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    scale, shift = state[f"{name}.1.weight"][:, None, None], state[f"{name}.1.bias"][:, None, None]
    return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)


def bilinear(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def uperhead(state: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """UPerHead: pool_scales (1, 2, 3, 6), align_corners False, dropout aside."""
    laterals = [conv_bn_relu(state, f"head.lateral.{i}", inputs[i]) for i in range(3)]
    pooled = [inputs[3]]
    for i, scale in enumerate((1, 2, 3, 6)):
        branch = conv_bn_relu(state, f"head.pyramid_pooling.branches.{i}.1", F.adaptive_avg_pool2d(inputs[3], scale))
        pooled.append(bilinear(branch, inputs[3].shape[2:]))
    laterals.append(conv_bn_relu(state, "head.pyramid_pooling.bottleneck", torch.cat(pooled, dim=1)))
    for i in (3, 2, 1):
        laterals[i - 1] = laterals[i - 1] + bilinear(laterals[i], laterals[i - 1].shape[2:])
    outs = [conv_bn_relu(state, f"head.smooth.{i}", laterals[i]) for i in range(3)] + [laterals[3]]
    outs = [bilinear(x, outs[0].shape[2:]) for x in outs]
    fused = conv_bn_relu(state, "head.fuse", torch.cat(outs, dim=1))
    return F.conv2d(fused, state["head.classify.1.weight"], state["head.classify.1.bias"])


def fcnhead(state: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """FCNHead: in_index 2, one convolution of 256 channels."""
    x = conv_bn_relu(state, "auxiliary.0", inputs[2])
    return F.conv2d(x, state["auxiliary.1.1.weight"], state["auxiliary.1.1.bias"])


def test_logits_and_loss_are_those_of_a_second_implementation() -> None:
    model = segmenter()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.eval()
    state = {name: value.detach() for name, value in model.named_parameters()}
    state = {
        name: torch.randn_like(v) if name.endswith(".1.weight") and v.ndim == 1 else v for name, v in state.items()
    }
    model.load_state_dict(state, strict=False)
    images, labels = torch.randn(3, 3, 96, 96), torch.randint(0, CLASSES, (3, 96, 96))
    labels[0, :40] = 255
    maps = model.backbone(images)
    torch.testing.assert_close(model.head(maps), uperhead(state, maps), atol=1e-4, rtol=1e-4)
    losses = []
    for logits in (uperhead(state, maps), fcnhead(state, maps)):
        scores = bilinear(logits, images.shape[2:]).log_softmax(1)
        right = scores.gather(1, labels.clamp(max=CLASSES - 1)[:, None])[:, 0]
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
