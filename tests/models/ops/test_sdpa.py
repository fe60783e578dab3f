import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixmae.models.ops.sdpa import explicit


def by_torch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_formula_equals_torch(dtype: torch.dtype, off: float) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 10, 8) for _ in range(3)]
    bias = torch.randn(1, 3, 10, 10).masked_fill_(torch.rand(10, 10) > 0.7, float("-inf"))
    bias.diagonal(dim1=-2, dim2=-1).zero_()
    results = []
    for attend in (explicit, by_torch):
        q, k, v, b = [x.to(dtype).requires_grad_() for x in (*inputs, bias)]
        out = attend(q, k, v, b, 0.3)
        results.append((out, *torch.autograd.grad(out.square().sum(), [q, k, v, b])))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, atol=off, rtol=off)
