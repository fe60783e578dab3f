"""MixMAE's ablations (Tables 9 and 10): what an input shows, what is reconstructed, and what excludes what."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixmae.models import MixMAE, create_encoder
from mixmae.models.methods import filling
from mixmae.models.methods.mixing import draw_groups, group_sizes
from mixmae.models.methods.reconstruction_loss import patchify

BATCH, SIDE, CELLS = 6, 128, 16
FILLS = ["zero", "learnable", "shuffle", "zoomin"]
SEEDS = st.integers(0, 2**32)


def small_model(**options: Any) -> MixMAE:
    torch.manual_seed(0)
    encoder = create_encoder("mixmae_swin_nano", depths=(1, 1, 1, 1))
    return MixMAE(encoder, 2, decoder_dim=32, decoder_depth=1, decoder_num_heads=2, **options)


def filled_model(fill: str, **options: Any) -> MixMAE:
    return small_model(fill=fill, separate_groups=False, dual=False, **options)


def pixels(cells: Tensor) -> Tensor:
    """A map of cells [..., 4, 4] at every pixel."""
    return cells.repeat_interleave(32, -2).repeat_interleave(32, -1)


@pytest.mark.parametrize("group_map", ["micro_batch", "sample"])
@pytest.mark.parametrize("fill", FILLS)
def test_an_image_is_reconstructed_where_it_is_masked(fill: str, group_map: str) -> None:
    model = filled_model(fill, group_map=group_map)
    images = torch.randn(BATCH, 3, SIDE, SIDE)
    groups, *others = drawn = model.draw(BATCH, torch.Generator().manual_seed(1))
    predictions, visible = model.predict(images, groups, *others)
    masked = (groups == 1).view(-1, CELLS).expand(BATCH, CELLS)
    assert torch.equal(visible.expand(1, BATCH, CELLS)[0], ~masked)
    targets = patchify(images, 32)
    targets = (targets - targets.mean(-1, keepdim=True)) / (targets.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = (predictions[0] - targets).square().mean(-1)[masked].mean()
    torch.testing.assert_close(model(images, *drawn), expected)


@pytest.mark.parametrize("fill", FILLS)
def test_other_cells_see_what_fills_masked_ones(fill: str) -> None:
    """And of a masked cell's own pixels nothing where tokens take their place, all where they are but moved."""
    model = filled_model(fill)
    images, drawn = torch.randn(2, 3, SIDE, SIDE), model.draw(2, torch.Generator().manual_seed(1))
    masked = pixels(drawn[0] == 1)
    with torch.no_grad():
        before = model.predict(images, *drawn)[0]
        after = model.predict(torch.where(masked, images + 1, images), *drawn)[0]
        assert torch.equal(before, after) == (fill in ("zero", "learnable"))
        if model.mask_token is not None:
            model.mask_token.add_(1)
            assert not torch.equal(model.predict(images, *drawn)[0], before)


@given(SEEDS, st.booleans(), st.sampled_from([(4, 4), (7, 7), (1, 3)]))
def test_shuffled_cells_change_places_among_masked_ones(seed: int, per_sample: bool, grid: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = draw_groups(3 if per_sample else None, 2, grid, generator)
    source = filling.draw_shuffle(groups, generator)
    images = torch.arange(grid[0] * grid[1]).view(1, 1, *grid).expand(3, 1, *grid)
    moved = filling.move_cells(images, source, grid)
    for before, after, mask in zip(images[:, 0], moved[:, 0], (groups == 1).expand(3, *grid), strict=True):
        assert torch.equal(after[~mask], before[~mask])
        assert torch.equal(after[mask].sort().values, before[mask])


def test_every_order_of_masked_cells_is_as_likely() -> None:
    generator, groups = torch.Generator().manual_seed(0), torch.tensor([[0, 1], [1, 1]]).expand(6000, 2, 2)
    orders, counts = filling.draw_shuffle(groups, generator).unique(dim=0, return_counts=True)
    assert len(orders) == 6
    assert (counts / 6000 - 1 / 6).abs().max() < 0.03  # six standard deviations


def test_zoomed_crops_lie_in_the_image_and_keep_its_shape() -> None:
    crops = filling.draw_crops(500, torch.Generator().manual_seed(0))
    area = crops[:, 0, 0] * crops[:, 1, 1]
    assert torch.equal(crops[:, 0, 0], crops[:, 1, 1])
    assert 0.2 <= area.min() < 0.22
    assert 0.58 < area.max() <= 0.6
    assert (crops[:, :, 2].abs() + crops[:, 0, :1]).max() <= 1 + 1e-6
    # Of an image of coordinates, a crop shows coordinates: evenly spaced, and about its own centre.
    axis = (torch.arange(64) + 0.5) / 32 - 1
    image = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))[None].expand(500, -1, -1, -1)
    zoomed = filling.zoom_in(image, crops)
    expected = crops[:, 0, 0, None] * axis + crops[:, 0, 2:]
    torch.testing.assert_close(zoomed[:, 0], expected[:, None].expand(-1, 64, -1).clamp(axis[0], axis[-1]))


@pytest.mark.parametrize("group_map", ["micro_batch", "sample"])
def test_two_images_with_mask_tokens_are_masked_by_three_quarters(group_map: str) -> None:
    model = small_model(extra_mask_ratio=0.5, group_map=group_map)
    images = torch.randn(BATCH, 3, SIDE, SIDE)
    groups, partners, hidden = model.draw(BATCH, torch.Generator().manual_seed(1))
    predictions, visible = model.predict(images, groups, partners, hidden)
    shown = visible.expand(2, BATCH, CELLS)
    assert torch.equal(shown.sum(-1), torch.full((2, BATCH), 4))
    for k in (0, 1):
        own = ((groups == k) & ~hidden).view(-1, CELLS)
        assert torch.equal(shown[k], own.expand(BATCH, CELLS))
    targets = patchify(images, 32)
    targets = (targets - targets.mean(-1, keepdim=True)) / (targets.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = (predictions - targets[partners]).square().mean(-1)[~shown].mean()
    torch.testing.assert_close(model(images, groups, partners, hidden), expected)
    unseen = torch.where(pixels(hidden.view(-1, 4, 4).expand(BATCH, 4, 4))[:, None], 3.0, torch.zeros(()))
    noise = torch.zeros_like(images).index_add(0, partners[0], unseen.expand_as(images))
    same = images if group_map == "sample" else images + noise  # there a partner's pixels lie elsewhere
    assert torch.equal(model.predict(same, groups, partners, hidden)[0], predictions)


@given(SEEDS, st.booleans(), st.integers(2, 5), st.floats(0.3, 0.7))
def test_hidden_cells_are_the_same_share_of_every_group(seed: int, per_sample: bool, k: int, ratio: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups, sizes = draw_groups(3 if per_sample else None, k, (7, 7), generator), group_sizes(k, 49)
    hidden = filling.draw_hidden(groups, sizes, ratio, generator)
    assert hidden.shape == groups.shape
    for members, taken in zip(groups.view(-1, 49), hidden.view(-1, 49), strict=True):
        assert members[taken].bincount(minlength=k).tolist() == [round(size * ratio) for size in sizes]


@pytest.mark.parametrize("group_map", ["micro_batch", "sample"])
def test_mix_embeddings_tell_groups_apart_in_every_stage(group_map: str) -> None:
    options: dict[str, Any] = {"separate_groups": False, "group_map": group_map}
    plain, model = small_model(**options), small_model(mix_embedding=True, **options)
    model.load_state_dict(plain.state_dict(), strict=False)
    images, drawn = torch.randn(BATCH, 3, SIDE, SIDE), model.draw(BATCH, torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(model(images, *drawn), list(model.mix_embedding))
    assert [tuple(gradient.shape) for gradient in gradients] == [(2, 32), (2, 64), (2, 128), (2, 256)]
    assert all((gradient.abs().sum(1) > 0).all() for gradient in gradients)
    with torch.no_grad():
        expected = plain(images, *drawn)
        assert not torch.equal(model(images, *drawn), expected)
        for embedding in model.mix_embedding:
            embedding.zero_()
        assert torch.equal(model(images, *drawn), expected)


ONE_IMAGE = {"num_images": 2, "separate_groups": False, "dual": False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**ONE_IMAGE, "fill": "zero", "num_images": 3}, "num_images is 3; set num_images=2"),
        ({**ONE_IMAGE, "fill": "zero", "separate_groups": True}, "fill=zero would be seen by nothing"),
        ({**ONE_IMAGE, "fill": "zoomin", "dual": True}, "fill=zoomin leaves one image in an input; set dual=false"),
        ({"mix_embedding": True}, "set separate_groups=false"),
        ({"extra_mask_ratio": 0.01}, "hides [0, 0, 0, 0] cells of groups of [4, 4, 4, 4]"),
        ({"extra_mask_ratio": 0.9}, "hides [4, 4, 4, 4] cells"),
        ({**ONE_IMAGE, "extra_mask_ratio": 0.5, "fill": "zero"}, "with fill=zero"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=re.escape(message)):
        MixMAE(create_encoder("mixmae_swin_nano"), **options)
