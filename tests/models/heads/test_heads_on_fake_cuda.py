"""Heads on a GPU that is not there: see `tests/models/methods/test_fake_cuda.py`."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mixmae.models.encoders.registry import create_encoder
from mixmae.models.heads.backbone import Backbone
from mixmae.models.heads.classification import Classifier
from mixmae.models.heads.mask_rcnn import proposals
from mixmae.models.heads.mask_rcnn.proposals import Proposals
from mixmae.models.heads.upernet import GridMean, Segmenter
from tests.models.fake_gpu import NoFixedOrder, move, on_gpu
from tests.models.heads.mask_rcnn.scenes import SIDE, images_of, objects_for, tiny_detector

SIZE, CLASSES = 64, 5


def segmenter() -> tuple[nn.Module, Tensor, Sequence[Tensor]]:
    model = Segmenter(Backbone(create_encoder("mixmae_swin_nano", img_size=SIZE)), CLASSES, width=16)
    return model, torch.randn(2, 3, SIZE, SIZE), [torch.randint(0, CLASSES, (2, SIZE, SIZE), dtype=torch.uint8)]


def classifier() -> tuple[nn.Module, Tensor, Sequence[Tensor]]:
    model = Classifier(create_encoder("mixmae_swin_nano", img_size=SIZE), CLASSES, mixes=True)
    return model, torch.randn(2, 3, SIZE, SIZE), [torch.tensor([1, 4]), torch.tensor([4.0, 20, 6, 30, 0, 1, 0.9])]


def detector() -> tuple[nn.Module, Tensor, Sequence[Tensor]]:
    return tiny_detector(), images_of(2), objects_for([2, 3])


def suppress(boxes: Tensor, scores: Tensor, levels: Tensor, anchors: Tensor, count: int) -> Proposals:
    """The one thing that a step of a detector waits for is how many proposals are left."""
    first = slice(0, count)
    filled = F.pad(boxes[:, first], (0, 0, 0, max(0, count - boxes.shape[1])))
    there = torch.ones(len(boxes), count, dtype=torch.bool, device=boxes.device)
    return Proposals(filled, there, F.pad(anchors[:, first], (0, max(0, count - anchors.shape[1]))))


@pytest.mark.parametrize("build", [segmenter, classifier, detector])
def test_a_step_reads_nothing_back_and_mixes_no_devices(
    build: Callable[[], tuple[nn.Module, Tensor, Sequence[Tensor]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images, inputs = build()
    monkeypatch.setattr(proposals, "suppress", suppress)
    with FakeTensorMode(allow_non_fake_inputs=False):
        move(model, on_gpu)
        given = [torch.empty(part.shape, dtype=part.dtype, device="cuda") for part in (images, *inputs)]
        loss = model(*given)
        assert (loss.device.type, loss.dtype, loss.shape) == ("cuda", torch.float32, ())


@pytest.mark.parametrize("build", [segmenter, classifier])
def test_a_step_has_a_fixed_order_of_sums(build: Callable[[], tuple[nn.Module, Tensor, Sequence[Tensor]]]) -> None:
    model, images, inputs = build()
    with NoFixedOrder() as order:
        model(images, *inputs).backward()
    assert order.found == set()


def test_a_detector_has_none() -> None:
    """So `train.deterministic` is refused for detection; a control for the test above."""
    model, images, inputs = detector()
    with NoFixedOrder() as order:
        model(images, *inputs).backward()
    assert order.found == {"torchvision::_roi_align_backward"}
    assert images.shape[-1] == SIDE


@pytest.mark.parametrize("side", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(7, 7), (16, 12), (3, 5)])
def test_means_over_a_grid_are_torchs(side: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, *size, requires_grad=True)
    found, expected = GridMean(side)(x), nn.AdaptiveAvgPool2d(side)(x)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(found, x, grad), torch.autograd.grad(expected, x, grad))
