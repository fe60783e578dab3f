"""What every encoder must do; a new family is one line in FAMILIES, and its parts in SEPARATING."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from mixmae.models import create_encoder
from mixmae.models.encoders import pvt, resnet, swin_stage, twins, vit
from mixmae.models.encoders.contract import Encoder
from mixmae.models.layers import cell_order, mixed_conv, mixed_norm
from mixmae.models.layers.mixed_cells import Mix
from mixmae.models.layers.token_order import by_window
from mixmae.models.methods.mixing import draw_mix, mix_images, upsample_groups

FAMILIES = ["mixmae_swin_nano", "mixmae_vit_nano", "mixmae_pvt_nano", "mixmae_twins_nano", "mixmae_resnet_nano"]
SIZE = 128
KINDS = ["micro_batch", "micro_batch, masked", "sample"]

every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def encoders() -> dict[str, Encoder]:
    torch.manual_seed(0)
    return {name: create_encoder(name) for name in FAMILIES}


def draw(encoder: Encoder, k: int, batch: int = 5, per_sample: bool = False) -> tuple[Tensor, Tensor]:
    """Mixed images, and their groups."""
    generator = torch.Generator().manual_seed(k)
    groups, partners = draw_mix(batch, k, encoder.grid, generator, per_sample)
    images = torch.randn(batch, 3, SIZE, SIZE, generator=generator)
    return mix_images(images, groups, partners), groups


def leak(encoder: Encoder, images: Tensor, groups: Tensor, num_groups: int | None) -> tuple[float, float]:
    """The largest change at positions of other groups, and the smallest at own ones, when a group's pixels change."""
    other, own = 0.0, float("inf")
    members = groups.expand(len(images), *encoder.grid)
    pixels = upsample_groups(members, (SIZE, SIZE))[:, None]
    with torch.no_grad():
        before = encoder(images, groups, num_groups)
        for group in range(int(groups.max()) + 1):
            after = encoder(torch.where(pixels == group, images.flip(-1) + 1, images), groups, num_groups)
            change = (after - before).abs().amax(-1)
            other = max(other, change[members != group].max().item())
            own = min(own, change[members == group].min().item())
    return other, own


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 3, 4, 5])
@every_family
def test_other_groups_see_exactly_nothing(encoders: dict[str, Encoder], name: str, k: int, kind: str) -> None:
    images, groups = draw(encoders[name], k, per_sample=kind == "sample")
    other, own = leak(encoders[name], images, groups, k if kind == "micro_batch" else None)
    assert other == 0
    assert own > 0


@pytest.mark.parametrize("kind", KINDS)
@every_family
def test_separation_is_exact_in_bf16(name: str, kind: str) -> None:
    torch.manual_seed(0)
    encoder = create_encoder(name).bfloat16()
    images, groups = draw(encoder, 4, per_sample=kind == "sample")
    other, own = leak(encoder, images.bfloat16(), groups, 4 if kind == "micro_batch" else None)
    assert other == 0
    assert own > 0


def without_groups(function: Callable[..., Any], kept: int) -> Callable[..., Any]:
    """The function of its first arguments alone, before the groups."""
    return lambda *inputs, **_: function(*inputs[:kept])


def unmixed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module's forward pass without its mix."""
    return lambda module, x, mix=None: forward(module, x)


def unmixed_pool(x: Tensor, kernel: int, stride: int, mix: Mix) -> Tensor:
    everything = Mix.of(torch.zeros(mix.cells, dtype=torch.long))
    return mixed_conv.mixed_max_pool2d(x, kernel, stride, everything)


SEPARATING: list[tuple[str, Any, str, Callable[..., Any]]] = [
    ("mixmae_swin_nano", swin_stage, "by_group", lambda *inputs: by_window(inputs[2], inputs[2][0], inputs[3])),
    ("mixmae_swin_nano", swin_stage, "separated", without_groups(lambda windows: windows, 1)),
    ("mixmae_vit_nano", vit, "by_cell", without_groups(cell_order.by_cell, 2)),
    ("mixmae_pvt_nano", pvt, "by_cell", without_groups(cell_order.by_cell, 2)),
    ("mixmae_twins_nano", twins, "by_cell", without_groups(cell_order.by_cell, 2)),
    ("mixmae_twins_nano", twins, "by_window", without_groups(cell_order.by_window, 2)),
    ("mixmae_twins_nano", mixed_conv.MixedConv2d, "forward", unmixed(mixed_conv.MixedConv2d.forward)),
    ("mixmae_resnet_nano", mixed_conv.MixedConv2d, "forward", unmixed(mixed_conv.MixedConv2d.forward)),
    ("mixmae_resnet_nano", mixed_norm.MixedGroupNormReLU, "forward", unmixed(mixed_norm.MixedGroupNormReLU.forward)),
    ("mixmae_resnet_nano", resnet, "mixed_max_pool2d", unmixed_pool),
]
"""Each part that keeps groups apart, and what stands in for it where it is switched off."""


@pytest.mark.parametrize(("name", "place", "part", "switched_off"), SEPARATING)
def test_without_any_one_part_groups_see_each_other(
    monkeypatch: pytest.MonkeyPatch,
    encoders: dict[str, Encoder],
    name: str,
    place: Any,
    part: str,
    switched_off: Callable[..., Any],
) -> None:
    images, groups = draw(encoders[name], 2)
    assert leak(encoders[name], images, groups, 2)[0] == 0
    monkeypatch.setattr(place, part, switched_off)
    assert leak(encoders[name], images, groups, 2)[0] > 0


@pytest.mark.parametrize("k", [2, 3])
@every_family
def test_groups_are_kept_apart_one_way_or_another_alike(encoders: dict[str, Encoder], name: str, k: int) -> None:
    """Sorted by group, behind a mask, and with a map for each sample."""
    encoder = encoders[name]
    images, groups = draw(encoder, k)
    results = []
    for given in ((groups, k), (groups, None), (groups.expand(len(images), *encoder.grid), None)):
        features = encoder(images, *given)
        gradients = torch.autograd.grad(features.square().mean(), list(encoder.parameters()))
        results.append((features, *gradients))
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


@every_family
def test_grad_checkpointing_changes_nothing(encoders: dict[str, Encoder], name: str) -> None:
    encoder = encoders[name]
    images, groups = draw(encoder, 2, batch=2)
    gradients = []
    for stages in ((), (1,), (2, 3, 4), None):
        encoder.set_grad_checkpointing(stages=stages)
        loss = encoder(images, groups, 2).square().mean()
        gradients.append(torch.autograd.grad(loss, list(encoder.parameters())))
    encoder.set_grad_checkpointing(False)
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


@every_family
def test_checkpointing_recomputes_the_blocks_of_named_stages(encoders: dict[str, Encoder], name: str) -> None:
    encoder = encoders[name]
    calls, hooks = [0, 0], []
    for stage in (0, 1):

        def count(*_: Any, stage: int = stage) -> None:
            calls[stage] += 1

        hooks.append(encoder.stage_blocks(stage + 1)[0].register_forward_pre_hook(count))
    encoder.set_grad_checkpointing(stages=(2,))
    encoder(torch.randn(1, 3, SIZE, SIZE)).sum().backward()
    encoder.set_grad_checkpointing(False)
    for hook in hooks:
        hook.remove()
    assert calls == [1, 2]


@every_family
def test_encoders_are_timm_models(name: str) -> None:
    model = timm.create_model(name, num_classes=10)
    images = torch.randn(2, 3, SIZE, SIZE)
    assert model.pretrained_cfg["input_size"] == (3, SIZE, SIZE)
    assert model(images).shape == (2, 10)
    features = model.forward_features(images)
    assert features.shape == (2, *model.grid, model.num_features)
    assert model.get_classifier().out_features == 10
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), features.mean((1, 2)), atol=1e-5, rtol=1e-4)
    parameters = dict(model.named_parameters())
    assert set(model.no_weight_decay()) <= set(parameters)


@every_family
def test_first_conv_takes_other_numbers_of_channels(name: str) -> None:
    model = timm.create_model(name, in_chans=1, num_classes=10)
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).weight.shape[1] == 1
    assert model(torch.randn(1, 1, SIZE, SIZE)).shape == (1, 10)


@every_family
def test_features_only_gives_the_stages(name: str) -> None:
    model = timm.create_model(name, features_only=True, out_indices=(1, 3))
    reductions = [16, 16] if "vit" in name else [8, 32]
    assert model.feature_info.reduction() == reductions
    maps = model(torch.randn(1, 3, SIZE, SIZE))
    channels = model.feature_info.channels()
    sides = [SIZE // reduction for reduction in reductions]
    assert [tuple(m.shape) for m in maps] == [(1, c, s, s) for c, s in zip(channels, sides, strict=True)]


@every_family
def test_features_are_the_forward_pass(encoders: dict[str, Encoder], name: str) -> None:
    encoder: Any = encoders[name]
    images = torch.randn(1, 3, SIZE, SIZE)
    final, maps = encoder.forward_intermediates(images, norm=True)
    torch.testing.assert_close(final, encoder.forward_features(images))
    torch.testing.assert_close(maps[-1].permute(0, 2, 3, 1), final)


@pytest.mark.parametrize("size", [192, (128, 64)])
@every_family
def test_other_input_sizes(encoders: dict[str, Encoder], name: str, size: int | tuple[int, int]) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    encoder = create_encoder(name)
    encoder.load_state_dict(encoders[name].state_dict())
    encoder.set_input_size(size)
    assert encoder.grid == (height // encoder.stride, width // encoder.stride)
    images = torch.randn(2, 3, height, width)
    groups, _ = draw_mix(2, 2, encoder.grid, torch.Generator().manual_seed(0))
    features = encoder(images, groups, 2)
    assert features.shape == (2, *encoder.grid, encoder.num_features)
    assert not torch.equal(features, encoder(images))
    if not name.startswith("mixmae_swin"):  # whose windows are arguments
        made = create_encoder(name, img_size=size)
        made.load_state_dict(made.fit_state_dict(encoders[name].state_dict()))
        torch.testing.assert_close(made(images, groups, 2), features)


@every_family
def test_sizes_that_do_not_fit_are_refused(name: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="100"):
        create_encoder(name, img_size=100)


@every_family
def test_layer_groups_are_the_stem_the_blocks_in_order_and_the_head(name: str) -> None:
    model = timm.create_model(name, num_classes=10)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    blocks = [block for stage in range(1, model.num_stages + 1) for block in model.stage_blocks(stage)]
    assert sorted(set(groups.values())) == list(range(len(blocks) + 2))
    names = {parameter: key for key, parameter in model.named_parameters()}
    for number, block in enumerate(blocks, start=1):
        assert {groups[names[parameter]] for parameter in block.parameters()} == {number}
    assert groups[f"{model.first_conv}.weight"] == 0
    assert groups["norm.weight"] == len(blocks)  # timm's matchers put the final norm with the last block
    assert groups["head.fc.weight"] == len(blocks) + 1


@every_family
def test_unmixed_images_can_be_exported(encoders: dict[str, Encoder], name: str) -> None:
    encoder = encoders[name].eval()
    images = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        program = torch.export.export(encoder, (images,))
        torch.testing.assert_close(program.module()(images), encoder(images))
    encoder.train()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_compile_whole_and_once(encoders: dict[str, Encoder], name: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = encoders[name], create_encoder(name)
    compiled.load_state_dict(eager.state_dict())
    compiler = CompileCounterWithBackend("aot_eager")
    for stage in range(1, compiled.num_stages + 1):
        for block in compiled.stage_blocks(stage):
            block.compile(fullgraph=True, dynamic=False, backend=compiler)
    frames = []
    for seed in range(3):
        images = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
        groups, _ = draw_mix(4, 3, eager.grid, torch.Generator().manual_seed(seed))
        results = []
        for encoder in (eager, compiled):
            features = encoder(images, groups, 3)
            results.append((features, *torch.autograd.grad(features.square().mean(), list(encoder.parameters()))))
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)
        frames.append(compiler.frame_count)
    assert frames[0] > 0
    assert frames == frames[:1] * 3
    assert not counters["graph_break"]
