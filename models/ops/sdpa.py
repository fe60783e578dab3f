"""How attention is computed on a device.

Shapes: q [P, h, N, d], k, v [P, h, M, d], P independent problems; bias [1, h, N, M].
"""

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor


def pin_attention() -> None:
    """Leaves cuDNN's attention out on GPUs. Torch prefers it on some, but only where no bias learns and, in passes
    without gradients, everywhere: a run would meet other kernels, and compile their plans, at its first picture."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """[P, h, N, d]. The bias may be -inf, but not for all keys of a query."""
    if q.device.type == "cpu":
        return explicit(q, k, v, bias, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def attend_unbiased(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[P, h, N, d] without a learned bias.

    Args:
        mask: [1 or P, 1, N, M], 0 or -inf, but not -inf for all keys of a query.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # torch's gradient there takes three to five times as long
        return explicit(q, k, v, mask, q.shape[-1] ** -0.5)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The formula. On CPUs torch's own way with a bias that learns is the same in fp32, and in bf16 five times slower:
    it widens all operands, and guards against queries that see nothing, of which there are none here."""
    logits = (q * scale) @ k.transpose(-2, -1)
    return (logits if bias is None else logits + bias).softmax(-1) @ v


# They look at the device: symbolic traces keep them whole.
torch.fx.wrap("attend")
torch.fx.wrap("attend_unbiased")
