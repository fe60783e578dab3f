"""Every way of computing the step is equal to published code's."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mixmae.models import MixMAE
from mixmae.models.methods.mixing import draw_mix
from mixmae.trainer.benchmarks.variants import VARIANTS, BareStep, Variant, Weights
from mixmae.trainer.recipe.schema import Recipe
from tests.helpers import tiny_recipe

HERE = torch.device("cpu")
OTHERS = [name for name, variant in VARIANTS.items() if not name.startswith("plain") and not variant.graphed]


def recipe_of(precision: str, k: int) -> Recipe:
    sizes = {"embed_dim": 32, "num_heads": [1, 2, 4, 8], "depths": [1, 1, 2, 1], "window_size": [8, 8, 8, 4]}
    model = {"encoder": {"img_size": 128, **sizes}, "method.num_images": k}
    return tiny_recipe(**{**model, "train.precision": precision, "train.zero_stage": 1, "train.micro_batch": 8})


def loss_and_gradients(recipe: Recipe, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """In fp32 on the CPU; gradients of all parameters in one row."""
    torch.manual_seed(0)
    step = BareStep(recipe, VARIANTS[name], device)
    images = torch.randn(8, 3, 128, 128, generator=torch.Generator().manual_seed(1)).to(device)
    assert isinstance(step.model, MixMAE)
    mix = draw_mix(8, step.model.num_images, step.model.grid, torch.Generator().manual_seed(2)).to(device)
    loss = step.loss(images, mix)
    gradients = torch.autograd.grad(loss, list(step.model.parameters()))
    return loss.detach().float().cpu(), torch.cat([gradient.float().flatten() for gradient in gradients]).cpu()


def assert_equal(recipe: Recipe, name: str, device: torch.device) -> None:
    """fp32: loss within 1e-5, gradients within 1e-4 of their norm; bf16, itself 0.8 % off fp32: 1e-4 and 1 %."""
    loss_off, gradients_off = (1e-5, 1e-4) if recipe.train.precision == "fp32" else (1e-4, 0.01)
    loss, gradients = loss_and_gradients(recipe, name, device)
    expected_loss, expected = loss_and_gradients(recipe, "plain", device)
    assert abs(loss - expected_loss) < loss_off
    assert (gradients - expected).norm() / expected.norm() < gradients_off


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["masked", "grouped", "selective", "recomputed"])
def test_variants_equal_published_code(name: str, precision: str, k: int) -> None:
    assert_equal(recipe_of(precision, k), name, HERE)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_code_equals_published_code(precision: str) -> None:
    assert_equal(recipe_of(precision, 4), "compiled", HERE)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OTHERS)
def test_variants_equal_published_code_on_a_gpu(name: str, precision: str, k: int) -> None:
    assert_equal(recipe_of(precision, k), name, torch.device("cuda"))


def test_a_difference_is_detected() -> None:
    """The control: groups that see each other are further off than any variant may be."""
    recipe = recipe_of("fp32", 4)
    mixed_up = recipe.model_copy(update={"method": recipe.method.model_copy(update={"separate_groups": False})})
    gradients, expected = (loss_and_gradients(r, "plain", HERE)[1] for r in (mixed_up, recipe))
    assert (gradients - expected).norm() / expected.norm() > 0.02


def test_variants_share_weights_and_states() -> None:
    """Eight of Swin-H, each with its own, take 88 GB."""
    recipe = recipe_of("bf16", 2)
    weights = Weights(recipe, HERE)
    first, *others = (list(BareStep(recipe, VARIANTS[name], HERE, weights).model.parameters()) for name in OTHERS[:3])
    assert all(own is shared for other in others for own, shared in zip(other, first, strict=True))


class Recorded:
    """Stands for a CUDA graph: what it recorded stays where it was."""

    replays = 0

    def replay(self) -> None:
        self.replays += 1


def test_a_graph_of_the_passes_leaves_their_gradients_to_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    ends = []
    for variant in (VARIANTS["grouped"], Variant("", graphed=True)):
        torch.manual_seed(0)
        step = BareStep(recipe_of("bf16", 2), variant, HERE)
        images, mix = torch.ones(8, 3, 128, 128), draw_mix(8, 2, (4, 4), torch.Generator())
        ends.append((step(images, mix), *step.model.parameters()))
        assert step.is_graphed == variant.graphed
    assert all(torch.equal(plain, graphed) for plain, graphed in zip(*ends, strict=True))


@pytest.mark.gpu
def test_a_graph_computes_what_its_kernels_do() -> None:
    ends = []
    for name in ("compiled-window", "graphed"):
        torch.manual_seed(0)
        step = BareStep(recipe_of("bf16", 2), VARIANTS[name], torch.device("cuda"))
        images = torch.randn(8, 3, 128, 128, generator=torch.Generator().manual_seed(1)).cuda()
        mix = draw_mix(8, 2, (4, 4), torch.Generator()).to(torch.device("cuda"))
        ends.append([float(step(images, mix)) for _ in range(3)])
    assert ends[1] == pytest.approx(ends[0], rel=1e-3)
    assert ends[1][2] < ends[1][0]


def test_a_step_moves_weights_and_leaves_no_gradient() -> None:
    step = BareStep(recipe_of("bf16", 2), VARIANTS["grouped"], HERE)
    before = [parameter.clone() for parameter in step.model.parameters()]
    step(torch.randn(8, 3, 128, 128), draw_mix(8, 2, (4, 4), torch.Generator()))
    after = list(step.model.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(parameter.grad is None and parameter.dtype == torch.bfloat16 for parameter in after)
