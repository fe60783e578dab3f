"""Blocks compile whole, and once: no graph breaks, and nothing is compiled again after the first steps."""

from typing import Literal

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from mixmae.models import MixMAE, create_encoder
from mixmae.models.methods.mixing import draw_mix
from mixmae.trainer.engine.activation_checkpointing import checkpoint_activations
from mixmae.trainer.engine.deepspeed_engine import compile_parts
from mixmae.trainer.recipe.schema import ActivationCheckpointing


@pytest.mark.parametrize(("k", "kind"), [(2, "none"), (4, "none"), (4, "selective"), (2, "torch")])
def test_compiled_parts_equal_eager_ones_and_stay_compiled(k: int, kind: Literal["none", "selective", "torch"]) -> None:
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = small_model(k), small_model(k)
    compiled.load_state_dict(eager.state_dict())
    checkpoint_activations(compiled, ActivationCheckpointing(kind=kind))
    compiler = CompileCounterWithBackend("aot_eager")
    compile_parts(compiled, backend=compiler)
    frames = []
    for seed in range(4):
        images = torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(seed))
        mix = draw_mix(4, k, eager.grid, torch.Generator().manual_seed(seed))
        for actual, expected in zip(results(compiled, images, *mix), results(eager, images, *mix), strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
        with torch.no_grad():  # as pictures are made
            compiled(images, *mix)
        frames.append(compiler.frame_count)
    assert frames[0] > 0
    assert frames == frames[:1] * 4
    assert not counters["graph_break"]


def small_model(k: int) -> MixMAE:
    torch.manual_seed(0)
    encoder = create_encoder("mixmae_swin_nano", window_size=(8, 8, 8, 4))
    return MixMAE(encoder, k, decoder_dim=32, decoder_depth=2, decoder_num_heads=2)


def results(model: MixMAE, images: Tensor, groups: Tensor, partners: Tensor) -> list[Tensor]:
    """The loss and all gradients."""
    loss = model(images, groups, partners)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]
