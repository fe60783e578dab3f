"""Reconstruction losses over the pixels that hold something alone."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixmae.models import create_encoder
from mixmae.models.methods.contract import Method
from mixmae.models.methods.reconstruction_loss import ReconstructionLoss, patchify
from mixmae.models.methods.registry import method_class
from mixmae.models.methods.simmim import MaskedPixelLoss

BATCH, SIDE, PATCH, CHANNELS = 3, 16, 4, 2
CELLS = (SIDE // PATCH) ** 2


def drawn(seed: int, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Predictions [K, B, L, P], images, partners, visible patches, and pixels that count."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH, CHANNELS, SIDE, SIDE, generator=generator)
    predictions = torch.randn(2, BATCH, CELLS, PATCH * PATCH * CHANNELS, generator=generator)
    partners = torch.stack([torch.arange(BATCH), torch.arange(BATCH).roll(1)])
    visible = torch.rand(2, 1, CELLS, generator=generator) < 0.5
    valid = torch.rand(BATCH, SIDE, SIDE, generator=generator) < share
    return predictions, images, partners, visible, valid


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@given(st.integers(0, 2**31))
def test_where_all_pixels_count_no_number_changes(norm_pix_loss: bool, seed: int) -> None:
    predictions, images, partners, visible, _ = drawn(seed, 1.0)
    loss, found = ReconstructionLoss(PATCH, norm_pix_loss), []
    for valid in (None, torch.ones(BATCH, SIDE, SIDE, dtype=torch.bool)):
        given_ = predictions.clone().requires_grad_()
        value = loss(given_, images, partners, visible, valid)
        found.append((value, *torch.autograd.grad(value, given_)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    mask = torch.rand(BATCH, 4, 4, generator=torch.Generator().manual_seed(seed)) < 0.6
    painted = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    everywhere = torch.ones(BATCH, SIDE, SIDE, dtype=torch.bool)
    assert torch.equal(MaskedPixelLoss()(painted, images, mask), MaskedPixelLoss()(painted, images, mask, everywhere))


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@given(st.integers(0, 2**31), st.sampled_from([0.1, 0.5, 0.95]))
def test_the_loss_is_the_mean_over_pixels_that_count(norm_pix_loss: bool, seed: int, share: float) -> None:
    """Pixel by pixel in NumPy."""
    predictions, images, partners, visible, valid = drawn(seed, share)
    found = ReconstructionLoss(PATCH, norm_pix_loss)(predictions, images, partners, visible, valid)
    targets = patchify(images, PATCH).double().numpy()
    counts = patchify(valid[:, None].expand_as(images), PATCH).numpy()
    total, number = 0.0, 0
    for k in range(2):
        for row in range(BATCH):
            image = int(partners[k, row])
            for cell in range(CELLS):
                there = counts[image, cell]
                if visible[k, 0, cell] or not there.any():
                    continue
                target = targets[image, cell][there]
                if norm_pix_loss:
                    target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
                guess = predictions[k, row, cell].double().numpy()[there]
                total, number = total + ((guess - target) ** 2).sum(), number + there.sum()
    assert found.item() == pytest.approx(total / number if number else 0.0, rel=1e-4)


@given(st.integers(0, 2**31))
def test_what_does_not_count_changes_nothing(seed: int) -> None:
    predictions, images, partners, visible, valid = drawn(seed, 0.7)
    other = torch.where(valid[:, None], images, 100 * torch.randn_like(images))
    mask = torch.rand(BATCH, 4, 4) < 0.6
    losses = [
        (
            ReconstructionLoss(PATCH)(predictions, given_, partners, visible, valid),
            MaskedPixelLoss()(torch.zeros_like(images), given_, mask, valid),
        )
        for given_ in (images, other)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_nothing_that_counts_is_no_loss_and_no_gradient() -> None:
    predictions, images, partners, visible, _ = drawn(0, 1.0)
    nothing = torch.zeros(BATCH, SIDE, SIDE, dtype=torch.bool)
    predictions.requires_grad_()
    loss = ReconstructionLoss(PATCH)(predictions, images, partners, visible, nothing)
    (gradient,) = torch.autograd.grad(loss, predictions)
    assert loss == 0
    assert (gradient == 0).all()
    assert MaskedPixelLoss()(images, images + 1, torch.ones(BATCH, 4, 4, dtype=torch.bool), nothing) == 0


DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}


@pytest.mark.parametrize(
    ("name", "family", "settings"),
    [
        ("mixmae", "swin", {"num_images": 2, **DECODER}),
        ("mixmae", "swin", {"num_images": 2, "extra_mask_ratio": 0.5, **DECODER}),
        ("mae", "vit", DECODER),
        ("simmim", "resnet", {}),
    ],
)
def test_methods_judge_pixels_that_count(name: str, family: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = method_class(name)(create_encoder(f"mixmae_{family}_nano", in_chans=4), **settings)
    images, inputs = torch.randn(2, 4, 128, 128), plain.draw(2, torch.Generator().manual_seed(0))
    before = plain(images, *inputs)
    plain.mask_invalid_pixels()
    assert plain.masks_invalid
    assert torch.equal(plain(images, *inputs, torch.ones(2, 128, 128, dtype=torch.bool)), before)
    valid = torch.ones(2, 128, 128, dtype=torch.bool)
    valid[:, :, :100] = False
    assert plain(images, *inputs, valid) != before
    columns = plain.reconstruct(images, *inputs, valid, rows=1)
    assert all(column.images.shape == (1, 4, 128, 128) for column in columns)
    assert all(column.images.isfinite().all() for column in columns)


class Judging(Method):
    """A method that knows nothing of pixels."""

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return ()

    def forward(self, images: Tensor, *inputs: Tensor) -> Tensor:
        return images.mean()


def test_a_method_that_cannot_leave_pixels_out_says_so() -> None:
    with pytest.raises(ValueError, match="Judging judges all pixels"):
        Judging(create_encoder("mixmae_vit_nano")).mask_invalid_pixels()
