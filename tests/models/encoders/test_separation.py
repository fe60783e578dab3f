"""Separation is proven, not assumed: what one source image shows changes nothing at another group's cells."""

import pytest
import torch

from mixmae.models import create_encoder
from mixmae.models.encoders.swin import Swin
from mixmae.models.methods.mixing import draw_mix, mix_images

SIZE, GRID = 128, (4, 4)


@pytest.fixture(scope="module")
def encoder() -> Swin:
    torch.manual_seed(0)
    encoder = create_encoder("mixmae_swin_nano", depths=(2, 2, 2, 2))
    assert isinstance(encoder, Swin)
    return encoder


MAPS = ["micro_batch", "micro_batch, masked", "sample"]


def changed_cells(encoder: Swin, k: int, kind: str, separate: bool, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest change at each cell [B, Gh, Gw] when all images of one group get other pixels, and the cells' groups."""
    batch = 6
    groups, partners = draw_mix(batch, k, GRID, torch.Generator().manual_seed(k), kind == "sample")
    images, others = torch.randn(2, batch, 3, SIZE, SIZE)
    before = mix_images(images, groups, partners)
    changed = mix_images(others, groups, partners)
    where = (groups.expand(batch, *GRID) == group).repeat_interleave(32, 1).repeat_interleave(32, 2)
    after = torch.where(where[:, None], changed, before)
    given = (groups if separate else None, k if kind == "micro_batch" else None)
    with torch.no_grad():
        difference = (encoder(after, *given) - encoder(before, *given)).abs().amax(-1)
    return difference, groups.expand(batch, *GRID)


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_other_groups_see_exactly_nothing(encoder: Swin, k: int, kind: str) -> None:
    for group in range(k):
        difference, groups = changed_cells(encoder, k, kind, True, group)
        assert difference[groups != group].max() == 0
        assert difference[groups == group].min() > 0


@pytest.mark.parametrize("k", [2, 5])
def test_without_separation_they_do(encoder: Swin, k: int) -> None:
    difference, groups = changed_cells(encoder, k, "micro_batch", False, 0)
    assert difference[groups != 0].min() > 0


def test_separation_is_exact_in_bf16(encoder: Swin) -> None:
    half = create_encoder("mixmae_swin_nano").bfloat16()
    groups = draw_mix(4, 4, GRID, torch.Generator().manual_seed(0)).groups
    for given in ((groups, 4), (groups,), (groups.expand(4, *GRID),)):
        before = torch.randn(4, 3, SIZE, SIZE).bfloat16()
        where = (groups == 1).repeat_interleave(32, 0).repeat_interleave(32, 1)
        after = torch.where(where, torch.randn_like(before), before)
        with torch.no_grad():
            difference = (half(after, *given) - half(before, *given)).abs().amax(-1)
        assert difference[:, groups != 1].max() == 0
        assert difference[:, groups == 1].max() > 0
