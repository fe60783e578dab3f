import pytest
import torch
import torch.nn.functional as F

from models.kernels import explicit


@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_formula_equals_torch(dtype: torch.dtype, off: float) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 10, 8) for _ in range(3)]
    bias = torch.randn(1, 3, 10, 10).masked_fill_(torch.rand(10, 10) > 0.7, float("-inf"))
    bias.diagonal(dim1=-2, dim2=-1).zero_()
    results = []
    for attend in (explicit, lambda q, k, v, b, scale: F.scaled_dot_product_attention(q, k, v, b, scale=scale)):
        given = [x.to(dtype).requires_grad_() for x in (*inputs, bias)]
        out = attend(*given, 0.3)
        results.append((out, *torch.autograd.grad(out.square().sum(), given)))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, atol=off, rtol=off)
