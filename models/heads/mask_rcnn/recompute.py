"""Layers of a head, which may be computed again in the backward pass."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Head(nn.Module):
    """A head whose `layers` are most of its work."""

    layers: nn.Module
    grad_checkpointing = False

    def run_layers(self, x: Tensor) -> Tensor:
        """Their output, which is recomputed in the backward pass where that is asked for."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(self.layers, x, use_reentrant=False, preserve_rng_state=False)
            return out
        return self.layers(x)
