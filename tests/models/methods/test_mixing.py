import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixmae.models.methods.mixing import draw_mix, mix_images, upsample_groups

SIZES = st.integers(2, 5).flatmap(lambda k: st.tuples(st.just(k), st.integers(k, 12)))


@given(SIZES, st.integers(0, 2**32), st.booleans())
def test_groups_are_as_equal_as_possible_and_no_input_holds_an_image_twice(
    sizes: tuple[int, int], seed: int, per_sample: bool
) -> None:
    k, batch = sizes
    mix = draw_mix(batch, k, (7, 7), torch.Generator().manual_seed(seed), per_sample)
    assert mix.groups.shape == ((batch, 7, 7) if per_sample else (7, 7))
    for groups in mix.groups.view(-1, 49):
        counts = groups.bincount(minlength=k)
        assert counts.max() - counts.min() <= 1
        assert counts.tolist() == sorted(counts.tolist(), reverse=True)
    assert torch.equal(mix.partners[0], torch.arange(batch))
    assert all(row.unique().numel() == batch for row in mix.partners)
    assert all(column.unique().numel() == k for column in mix.partners.T)


def test_group_sizes_of_the_paper() -> None:
    sizes = {k: draw_mix(8, k, (7, 7), torch.Generator()).groups.flatten().bincount().tolist() for k in (2, 3, 4, 5)}
    assert sizes == {2: [25, 24], 3: [17, 16, 16], 4: [13, 12, 12, 12], 5: [10, 10, 10, 10, 9]}


def test_every_cell_is_as_often_in_every_group() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.stack([draw_mix(4, 4, (7, 7), generator).groups for _ in range(4000)])
    share = torch.stack([(maps == k).float().mean(0) for k in range(4)])
    expected = torch.tensor([13, 12, 12, 12]) / 49
    assert (share - expected[:, None, None]).abs().max() < 0.04  # six standard deviations


def test_every_other_image_is_as_often_a_partner() -> None:
    generator = torch.Generator().manual_seed(0)
    partners = torch.stack([draw_mix(5, 3, (4, 4), generator).partners for _ in range(4000)])
    for k in (1, 2):
        share = torch.stack([(partners[:, k] == image).float().mean(0) for image in range(5)])
        assert share.diagonal().max() == 0
        assert (share[~torch.eye(5, dtype=torch.bool)] - 0.25).abs().max() < 0.05


@given(SIZES, st.integers(0, 2**32), st.booleans())
def test_mixed_cells_come_from_the_partner_of_their_group(sizes: tuple[int, int], seed: int, per_sample: bool) -> None:
    k, batch = sizes
    mix = draw_mix(batch, k, (2, 3), torch.Generator().manual_seed(seed), per_sample)
    images = torch.arange(batch * 3 * 8 * 12.0).view(batch, 3, 8, 12)
    mixed = mix_images(images, *mix)
    for i in range(batch):
        groups = mix.groups[i] if per_sample else mix.groups
        for row in range(2):
            for col in range(3):
                cell = (i, slice(None), slice(4 * row, 4 * row + 4), slice(4 * col, 4 * col + 4))
                source = int(mix.partners[groups[row, col], i])
                assert torch.equal(mixed[cell], images[(source, *cell[1:])])


def test_mix_is_a_function_of_its_generator() -> None:
    first, second, other = (draw_mix(8, 3, (7, 7), torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(first.groups, second.groups)
    assert torch.equal(first.partners, second.partners)
    assert not torch.equal(first.groups, other.groups)


def test_upsampling_is_nearest_neighbour() -> None:
    groups = torch.tensor([[0, 1], [2, 3]])
    expected = torch.nn.functional.interpolate(groups[None, None].float(), size=(8, 4), mode="nearest")
    assert torch.equal(upsample_groups(groups, (8, 4)), expected[0, 0].long())


@pytest.mark.parametrize(("batch", "k", "grid"), [(3, 4, (7, 7)), (8, 1, (7, 7)), (8, 6, (7, 7)), (8, 5, (2, 2))])
def test_impossible_mixes_are_refused(batch: int, k: int, grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"num_images|micro_batch|img_size"):
        draw_mix(batch, k, grid, torch.Generator())
