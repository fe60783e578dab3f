"""Refinement against its definition, written out image by image, and its queue over steps and ranks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmae.models import create_encoder
from mixmae.models.methods.neighbours import NeighbourHead
from mixmae.models.methods.refine import Refine
from mixmae.models.methods.views import draw_views, views_of
from mixmae.trainer.engine.distributed import Ranks
from tests.helpers import run_ranks

SETTINGS: dict[str, Any] = {"num_blocks": 3, "hidden_dim": 24, "embed_dim": 8, "queue_size": 10, "temperature": 0.3}


def build(family: str = "swin", **changes: Any) -> Refine:
    torch.manual_seed(0)
    return Refine(create_encoder(f"mixmae_{family}_nano"), **SETTINGS | changes)


def last_outputs(model: Refine, views: Tensor) -> list[Tensor]:
    """Pooled features behind the last blocks, as hooks see them."""
    seen: list[Tensor] = []
    blocks = [block for stage in range(1, 5) for block in model.encoder.stage_blocks(stage)]
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in blocks]
    final = model.encoder(views)
    for hook in hooks:
        hook.remove()
    inner = [out.reshape(len(views), -1, out.shape[-1]).mean(1) for out in seen[-SETTINGS["num_blocks"] : -1]]
    return [*inner, final.mean((1, 2))]


def written_out(head: NeighbourHead, features: Tensor) -> Tensor:
    """The loss of one head, as the papers have it: for each view and image one cross entropy."""
    count, queue = len(features) // 2, head.queue.clone()
    z = [F.normalize(head.projector(head.norm(row[None]))[0], dim=0) for row in features]
    p = [F.normalize(head.predictor(head.projector(head.norm(row[None])))[0], dim=0) for row in features]
    losses = []
    for view in (0, 1):
        for i in range(count):
            here, other = view * count + i, (1 - view) * count + i
            neighbour = queue[max(range(len(queue)), key=lambda q: float(queue[q] @ z[here].detach()))]
            positive = (neighbour @ p[other] / head.temperature).exp()
            negatives = [z[view * count + j].detach() @ p[other] for j in range(count) if j != i]
            losses.append(-(positive / (positive + sum((n / head.temperature).exp() for n in negatives))).log())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("family", ["swin", "twins"])
def test_loss_and_gradients_are_those_of_the_definition(family: str) -> None:
    model, images = build(family), torch.randn(3, 3, 128, 128)
    inputs = model.draw(3, torch.Generator().manual_seed(1))
    features = last_outputs(model, views_of(images, *inputs))
    heads = [head for head in model.heads if isinstance(head, NeighbourHead)]
    losses = [written_out(head, of_block) for head, of_block in zip(heads, features, strict=True)]
    expected = torch.stack(losses).mean()
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = model(images, *inputs)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for actual, gradient in zip(torch.autograd.grad(loss, list(model.parameters())), expected_gradients, strict=True):
        torch.testing.assert_close(actual, gradient, atol=1e-5, rtol=1e-3)


def test_the_queue_holds_the_newest_first_views_and_changes_in_training_alone() -> None:
    head = NeighbourHead(6, 8, 4, queue_size=5, temperature=0.2)
    batches = [torch.randn(4, 6) for _ in range(4)]
    embedded = [F.normalize(head.projector(head.norm(batch[:2])), dim=1) for batch in batches]
    random = head.queue.clone()
    head.eval()(batches[0])
    with torch.no_grad():
        head.train()(batches[0])
    assert torch.equal(head.queue, random)
    for batch in batches:
        head(batch)
    newest = torch.cat(embedded)[-5:]
    assert sorted(head.queue[:, 0].tolist()) == pytest.approx(sorted(newest[:, 0].tolist()), abs=1e-6)
    assert head.begin.item() == 8 % 5
    assert head(torch.full((4, 6), torch.nan)).isnan()
    assert head(batches[0]).isfinite()


def test_views_show_crops_of_the_image() -> None:
    """Where colours stay, a view is what torchvision's resized crop makes of the same rectangle."""
    from torchvision.transforms.functional import hflip, resized_crop

    images = torch.rand(1, 3, 32, 32)
    crops = torch.tensor([[[0.5, 0, -0.25], [0, 0.25, 0.5]], [[-1.0, 0, 0], [0, 1, 0]]])
    views = views_of(images, crops, torch.tensor([[0.0, 1, 1]]).expand(2, -1))
    crop = resized_crop(images, 20, 4, 8, 16, [32, 32], antialias=False)
    torch.testing.assert_close(views[0, :, 3:-3, 3:-3], crop[0, :, 3:-3, 3:-3], atol=1e-5, rtol=0)
    torch.testing.assert_close(views[1], hflip(images)[0], atol=1e-5, rtol=0)


def test_crops_stay_in_the_image_and_colours_in_their_ranges() -> None:
    crops, colours = draw_views(500, 0.25, torch.Generator().manual_seed(0))
    half, centre = torch.stack([crops[:, 0, 0].abs(), crops[:, 1, 1]], 1), crops[:, :, 2]
    assert ((half + centre.abs()) <= 1 + 1e-6).all()
    area = half.prod(1)
    assert 0.15 < area.min() < 0.3
    assert 0.4 < (crops[:, 0, 0] < 0).float().mean() < 0.6
    assert 0.1 < (colours[:, 2] == 0).float().mean() < 0.3
    assert colours[:, 0].abs().max() <= 0.4
    assert not torch.equal(crops[:500], crops[500:])


def step(ranks: Ranks, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    head = NeighbourHead(6, 8, 4, queue_size=5, temperature=0.2)
    own = features[:, 2 * ranks.rank : 2 * ranks.rank + 2] if ranks.world_size > 1 else features
    loss = head(own.flatten(0, 1))
    loss.backward()
    weight = head.projector[0]
    assert isinstance(weight, nn.Linear)
    assert weight.weight.grad is not None
    return loss.detach(), weight.weight.grad, head.queue


@pytest.mark.distributed
def test_ranks_have_the_negatives_and_the_queue_of_all() -> None:
    features = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3))
    loss, gradient, queue = step(Ranks(), features)
    of_ranks = run_ranks(step, 2, features)
    torch.testing.assert_close(torch.stack([each[0] for each in of_ranks]).mean(), loss)
    torch.testing.assert_close(torch.stack([each[1] for each in of_ranks]).mean(0), gradient)
    for each in of_ranks:
        torch.testing.assert_close(each[2], queue)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": 6}, "num_blocks is 6; expected 1 to 5"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"min_scale": 2.0}, "a min_scale up to 1"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)
