"""What every method must do on every encoder; a new method is a line in METHODS, an encoder that it has in FAMILIES."""

from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from mixmae.models import create_encoder
from mixmae.models.methods.contract import Method
from mixmae.models.methods.registry import method_class
from mixmae.trainer.engine.activation_checkpointing import checkpoint_activations
from mixmae.trainer.engine.deepspeed_engine import compile_parts
from mixmae.trainer.recipe.sections.train import ActivationCheckpointing
from tests.models.methods.teachers import small_teacher

FAMILIES = ["swin", "vit", "pvt", "twins", "resnet"]
DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
ONE_IMAGE = {"num_images": 2, "separate_groups": False, "dual": False, **DECODER}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixmae": ("mixmae", {"num_images": 3, **DECODER}),
    "simmim": ("simmim", {}),
    "mae": ("mae", DECODER),
    "zero": ("mixmae", {"fill": "zero", **ONE_IMAGE}),
    "learnable": ("mixmae", {"fill": "learnable", **ONE_IMAGE}),
    "shuffle": ("mixmae", {"fill": "shuffle", **ONE_IMAGE}),
    "zoomin": ("mixmae", {"fill": "zoomin", **ONE_IMAGE}),
    "mask_tokens": ("mixmae", {"num_images": 2, "extra_mask_ratio": 0.5, **DECODER}),
    "mix_embedding": ("mixmae", {"num_images": 2, "separate_groups": False, "mix_embedding": True, **DECODER}),
    "distill": ("mixmae_distill", {"num_images": 3, "teacher_weight": 0.25, **DECODER}),
    "refine": ("refine", {"num_blocks": 2, "hidden_dim": 32, "embed_dim": 16, "queue_size": 64, "temperature": 1.0}),
}
ON_ALL = [(family, method) for method in ("mixmae", "simmim", "learnable", "mask_tokens") for family in FAMILIES]
ON_SOME = [("vit", "mae"), ("swin", "mae"), ("swin", "zero"), ("swin", "shuffle"), ("swin", "zoomin")]
ON_SOME += [("swin", "distill"), ("swin", "refine"), ("vit", "refine")]
COMBINATIONS = [*ON_ALL, *ON_SOME, ("swin", "mix_embedding"), ("resnet", "mix_embedding")]
BATCH, SIZE = 3, 128
RECTANGLE = (64, 192)

every_combination = pytest.mark.parametrize(("family", "method"), COMBINATIONS)
every_reconstruction = pytest.mark.parametrize(
    ("family", "method"), [pair for pair in COMBINATIONS if pair[1] != "refine"]
)


def build(family: str, method: str, **sizes: Any) -> Method:
    torch.manual_seed(0)
    name, settings = METHODS[method]
    if method == "distill":
        settings = {**settings, "teacher": small_teacher()}
    model = method_class(name)(create_encoder(f"mixmae_{family}_nano", **sizes), **settings)
    return model.eval() if method == "refine" else model  # whose queue each step of training changes


def drawn(model: Method, seed: int) -> tuple[Tensor, ...]:
    return model.draw(BATCH, torch.Generator().manual_seed(seed))


def gradients(model: Method, images: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The loss, then those of all parameters."""
    loss = model(images, *inputs)
    return (loss, *torch.autograd.grad(loss, list(model.parameters())))


@every_combination
def test_all_parameters_learn_with_and_without_checkpointing(family: str, method: str) -> None:
    model = build(family, method)
    images, inputs = torch.rand(BATCH, 3, SIZE, SIZE), drawn(model, 0)
    loss, *expected = gradients(model, images, inputs)
    assert loss.dtype == torch.float32
    assert 0.3 < loss.item() < 2  # of random weights: about 1 where targets are normalised
    for (name, _), gradient in zip(model.named_parameters(), expected, strict=True):
        assert gradient.abs().sum() > 0, name
    model.set_grad_checkpointing(model.block_groups().keys())
    for again, once in zip(gradients(model, images, inputs), (loss, *expected), strict=True):
        assert torch.equal(again, once)


@every_combination
def test_all_that_is_random_is_drawn_on_the_cpu_in_shapes_that_stay(family: str, method: str) -> None:
    with torch.device("meta"):
        model = build(family, method)
    first, again, other = drawn(model, 0), drawn(model, 0), drawn(model, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert [(x.shape, x.dtype, x.device.type) for x in first] == [(x.shape, x.dtype, "cpu") for x in other]


@every_reconstruction
def test_pictures_are_of_the_first_images(family: str, method: str) -> None:
    model = build(family, method)
    images, inputs = torch.randn(BATCH, 3, SIZE, SIZE), drawn(model, 0)
    with torch.no_grad():
        columns = model.reconstruct(images, *inputs, rows=2)
    assert len(columns) >= 3
    assert len({column.title for column in columns}) == len(columns)
    assert all(column.images.shape == (2, 3, SIZE, SIZE) for column in columns)
    assert all(column.images.isfinite().all() for column in columns)
    source, painted = columns[1].images, columns[2].images
    same = (source == painted).unflatten(3, (-1, 16)).unflatten(2, (-1, 16)).all(-1).all(-2).all(1)
    assert 0.1 < same.float().mean() < 0.7, "visible patches are the image's own, and others are predicted"


@every_reconstruction
def test_images_may_be_rectangles_of_any_channels(family: str, method: str) -> None:
    """All cells and channels are learned from: no side is taken for the other."""
    channels = 3 if method == "distill" else 4  # as teachers are of RGB images
    model = build(family, method, img_size=RECTANGLE, in_chans=channels)
    images, inputs = torch.randn(BATCH, channels, *RECTANGLE), drawn(model, 0)
    assert model.encoder.grid == tuple(side // model.encoder.stride for side in RECTANGLE)
    loss = model(images.requires_grad_(), *inputs)
    assert 0.3 < loss.item() < 2
    (gradient,) = torch.autograd.grad(loss, images)
    cells = gradient.abs().sum((0, 1)).unflatten(1, (-1, 32)).unflatten(0, (-1, 32)).sum((1, 3))
    assert (cells > 0).all()
    assert (gradient.abs().sum((0, 2, 3)) > 0).all()
    with torch.no_grad():
        columns = model.reconstruct(images, *inputs, rows=2)
    assert all(column.images.shape == (2, channels, *RECTANGLE) for column in columns)
    same = (columns[1].images == columns[2].images).unflatten(3, (-1, 16)).unflatten(2, (-1, 16))
    assert 0.1 < same.all(-1).all(-2).all(1).float().mean() < 0.7, "visible patches are the image's own"


@pytest.mark.parametrize(
    ("family", "method", "kind"),
    [
        ("swin", "mixmae", "selective"),
        pytest.param("swin", "mixmae", "torch", marks=pytest.mark.slow),
        pytest.param("swin", "mae", "none", marks=pytest.mark.slow),
        pytest.param("vit", "mae", "none", marks=pytest.mark.slow),
        pytest.param("swin", "simmim", "none", marks=pytest.mark.slow),
    ],
)
def test_compiled_parts_equal_eager_ones_and_stay_compiled(
    family: str, method: str, kind: Literal["none", "selective", "torch"]
) -> None:
    """Blocks and the loss compile whole, and once."""
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = build(family, method), build(family, method)
    checkpoint_activations(compiled, ActivationCheckpointing(kind=kind))
    compiler = CompileCounterWithBackend("aot_eager")
    compile_parts(compiled, backend=compiler)
    frames = []
    for seed in range(3):
        images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
        inputs = drawn(eager, seed)
        results = (gradients(model, images, inputs) for model in (compiled, eager))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
        with torch.no_grad():  # as pictures are made
            compiled(images, *inputs)
        frames.append(compiler.frame_count)
    assert frames[0] > 0
    assert frames == frames[:1] * 3
    assert not counters["graph_break"]


@every_combination
def test_a_model_in_bf16_has_about_the_same_loss(family: str, method: str) -> None:
    model = build(family, method)
    images, inputs = torch.randn(BATCH, 3, SIZE, SIZE), drawn(model, 0)
    with torch.no_grad():
        expected = model(images, *inputs)
        actual = model.bfloat16()(images, *inputs)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=0.03, rtol=0)
