from typing import Any

import pytest
import torch
from torch import Tensor

from mixmae.models import MixMAE, create_encoder
from mixmae.models.methods.mixing import Mix, draw_mix
from mixmae.models.methods.reconstruction_loss import normalize_patches, patchify, unpatchify

BATCH, SIDE = 6, 128


def small_model(num_images: int = 3, **options: Any) -> MixMAE:
    torch.manual_seed(0)
    return MixMAE(
        create_encoder("mixmae_swin_nano"), num_images, decoder_dim=32, decoder_depth=1, decoder_num_heads=2, **options
    )


def drawn(num_images: int, per_sample: bool = False) -> Mix:
    return draw_mix(BATCH, num_images, (4, 4), torch.Generator().manual_seed(3), per_sample)


def loss_of_the_paper(model: MixMAE, images: Tensor, mix: Mix, normalised: bool, sequences: int) -> Tensor:
    """The loss, patch by patch, as section 3.2 has it."""
    predictions, _ = model.predict(images, *mix)
    errors = []
    for k in range(sequences):
        for i in range(BATCH):
            groups = mix.groups[i] if mix.groups.dim() == 3 else mix.groups
            for p, group in enumerate(groups.flatten().tolist()):
                if group == k:
                    continue
                row, col = divmod(p, 4)
                source = images[mix.partners[k, i]]
                target = source[:, 32 * row : 32 * row + 32, 32 * col : 32 * col + 32].permute(1, 2, 0).flatten()
                if normalised:
                    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                errors.append((predictions[k, i, p] - target).square().mean())
    return torch.stack(errors).mean()


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_loss_is_the_error_of_all_masked_patches(k: int, per_sample: bool) -> None:
    model, images, mix = small_model(k), torch.randn(BATCH, 3, SIDE, SIDE), drawn(k, per_sample)
    torch.testing.assert_close(model(images, *mix), loss_of_the_paper(model, images, mix, True, k))


def test_ablations_of_the_loss() -> None:
    images, mix = torch.randn(BATCH, 3, SIDE, SIDE), drawn(3)
    pixels = small_model(norm_pix_loss=False)
    torch.testing.assert_close(pixels(images, *mix), loss_of_the_paper(pixels, images, mix, False, 3))
    single = small_model(dual=False)
    torch.testing.assert_close(single(images, *mix), loss_of_the_paper(single, images, mix, True, 1))


def test_two_images_are_reconstructed_once_each() -> None:
    model, images, (groups, partners) = small_model(2), torch.randn(BATCH, 3, SIDE, SIDE), drawn(2)
    predictions, visible = model.predict(images, groups, partners)
    whole = torch.empty(BATCH, 16, 3072)
    for k in (0, 1):
        masked = ~visible[k, 0]
        whole[partners[k][:, None], masked.nonzero()[:, 0]] = predictions[k][:, masked]
    expected = (whole - normalize_patches(patchify(images, 32))).square().mean()
    torch.testing.assert_close(model(images, groups, partners), expected)


def test_untrained_loss_is_about_one() -> None:
    images = torch.rand(BATCH, 3, SIDE, SIDE)
    assert 0.95 < small_model()(images, *drawn(3)).item() < 1.3


def test_patchify_and_back() -> None:
    images = torch.randn(2, 3, 64, 96)
    x = patchify(images, 32)
    assert torch.equal(x[1, 4].view(32, 32, 3), images[1, :, 32:64, 32:64].permute(1, 2, 0))
    assert torch.equal(unpatchify(x, (2, 3)), images)


def test_loss_is_fp32_in_a_bf16_model() -> None:
    model = small_model().bfloat16()
    assert model(torch.randn(BATCH, 3, SIDE, SIDE), *drawn(3)).dtype == torch.float32


def test_shared_and_per_sample_maps_agree() -> None:
    model, images, mix = small_model(3), torch.randn(BATCH, 3, SIDE, SIDE), drawn(3)
    each = model(images, mix.groups.expand(BATCH, 4, 4), mix.partners)
    torch.testing.assert_close(each, model(images, *mix))
