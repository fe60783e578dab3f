"""Synchronised BatchNorm against torch's BatchNorm of all ranks' maps at once."""

import pytest
import torch
from torch import Tensor, nn

from mixmae.models.layers.sync_batch_norm import SyncBatchNorm2d
from mixmae.trainer.engine.distributed import Ranks, join
from tests.helpers import run_ranks

_STEPS = 2


def draw(step: int) -> tuple[Tensor, Tensor]:
    """Maps [4, 3, 5, 6] of four images that have little in common, and gradients of what becomes of them."""
    generator = torch.Generator().manual_seed(step)
    size = torch.tensor([0.1, 1.0, 5.0, 20.0])[:, None, None, None]
    maps = torch.randn(4, 3, 5, 6, generator=generator) * size + 3 * size
    return maps.contiguous(memory_format=torch.channels_last), torch.randn(4, 3, 5, 6, generator=generator)


def train(norm: nn.Module, part: slice) -> dict[str, Tensor]:
    """Two steps of some of the images: outputs and gradients, the sums of the parameters', and running statistics."""
    found: dict[str, Tensor] = {}
    nn.init.constant_(norm.get_parameter("weight"), 2.0)
    for step in range(_STEPS):
        maps, gradient = draw(step)
        x = maps[part].requires_grad_()
        out = norm(x)
        out.backward(gradient[part])
        assert x.grad is not None
        found |= {f"out{step}": out.detach(), f"grad{step}": x.grad}
    for name, parameter in norm.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad
    found |= {name: buffer for name, buffer in norm.named_buffers() if name.startswith("running")}
    return found | {"eval": norm.eval()(draw(9)[0]).detach()}


def test_on_one_rank_it_is_torchs() -> None:
    expected, found = train(nn.BatchNorm2d(3), slice(4)), train(SyncBatchNorm2d(3), slice(4))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_maps_of_bfloat16_have_statistics_of_fp32() -> None:
    norm = SyncBatchNorm2d(3)
    norm.weight.data, norm.bias.data = norm.weight.data.bfloat16(), norm.bias.data.bfloat16()
    maps = draw(0)[0].bfloat16()
    out = norm(maps)
    assert (out.dtype, norm.running_mean.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(norm.running_mean, 0.1 * maps.float().mean((0, 2, 3)))


def train_part(ranks: Ranks) -> dict[str, Tensor]:
    join(ranks)
    return train(SyncBatchNorm2d(3), slice(2 * ranks.rank, 2 * ranks.rank + 2))


@pytest.mark.distributed
def test_two_ranks_have_the_statistics_and_gradients_of_one() -> None:
    expected, parts = train(nn.BatchNorm2d(3), slice(4)), run_ranks(train_part, 2)
    for name, value in expected.items():
        own = [part[name] for part in parts]
        if name in ("weight", "bias"):
            found = own[0] + own[1]
        elif name.startswith(("out", "grad")):
            found = torch.cat(own)
        else:
            assert torch.equal(own[0], own[1]), name
            found = own[0]
        torch.testing.assert_close(found, value, atol=2e-5, rtol=1e-4, msg=name)
