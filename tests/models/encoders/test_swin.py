import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mixmae.models import MixMAE, create_encoder
from mixmae.models.encoders.registry import ENCODERS
from mixmae.models.encoders.swin import Swin
from mixmae.models.layers import window_attention as layers
from mixmae.models.layers.window_attention import WindowAttention, try_kernel
from mixmae.models.methods.mixing import draw_groups
from mixmae.models.ops import grouped_attention, window_attention
from tests.models.fake_gpu import move, on_gpu
from tests.models.ops import triton_cases

# Section 2's table of the method: encoder parameters, with decoder (M), encoder and with-decoder forward GMACs.
TABLE = {
    "mixmae_swin_base": (87.3, 114.7, 16.0, 18.6),
    "mixmae_swin_base_w14": (87.3, 114.7, 16.3, 19.0),
    "mixmae_swin_large": (195.9, 223.5, 35.8, 38.5),
    "mixmae_swin_huge": (656.4, 684.7, 117.6, 120.3),
}


def millions(model: torch.nn.Module) -> float:
    """Parameters and fixed positions, which the published counts include."""
    positions = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("positions"))
    return (sum(parameter.numel() for parameter in model.parameters()) + positions) / 1e6


@pytest.mark.parametrize("name", TABLE)
def test_sizes_and_macs_equal_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        encoder = create_encoder(name)
        model = MixMAE(encoder, num_images=2, separate_groups=False)  # counted as if all tokens saw each other
        images, groups, partners = torch.empty(2, 3, 224, 224), torch.zeros(7, 7).long(), torch.zeros(2, 2).long()
        with FlopCounterMode(display=False) as alone:
            encoder(images)
        with FlopCounterMode(display=False) as whole:
            model(images, groups, partners)
    macs = [counter.get_total_flops() / 2 / len(images) / 1e9 for counter in (alone, whole)]
    assert (millions(encoder), millions(model), *macs) == pytest.approx(TABLE[name], rel=5e-3)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("mixmae_swin_nano", "mixmae_swin_base_w14") else pytest.mark.slow)
        for name in ENCODERS
        if name.startswith("mixmae_swin")
    ],
)
def test_encoders_are_timm_models(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
        side = model.pretrained_cfg["input_size"][1]
        images = torch.empty(2, 3, side, side)
        assert model(images).shape == (2, 10)
        assert model.forward_features(images).shape == (2, side // 32, side // 32, model.num_features)
        model.reset_classifier(0)
        assert model(images).shape == (2, model.num_features)


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 3), (2,)])
def test_features_only_gives_the_stages(indices: tuple[int, ...]) -> None:
    model = timm.create_model("mixmae_swin_nano", features_only=True, out_indices=indices)
    maps = model(torch.randn(1, 3, 128, 128))
    assert [tuple(m.shape) for m in maps] == [(1, 32 * 2**i, 32 // 2**i, 32 // 2**i) for i in indices]
    assert model.feature_info.reduction() == [4 * 2**i for i in indices]


def test_the_order_of_windows_goes_where_the_model_goes_and_is_no_buffer() -> None:
    """Checkpoints hold all buffers of a model: one more, and a run could not be continued from older ones."""
    with torch.device("meta"):
        model = create_encoder("mixmae_swin_nano")
    assert {name.rsplit(".", 1)[-1] for name, _ in model.named_buffers()} == {"positions", "relative_position_index"}
    model = model.to_empty(device="cpu")
    made = create_encoder("mixmae_swin_nano")
    model.load_state_dict(made.state_dict())
    for (_, moved), (_, buffer) in zip(model.named_buffers(), made.named_buffers(), strict=True):
        moved.copy_(buffer)
    images = torch.randn(1, 3, 128, 128)
    assert torch.equal(model(images), made(images))


def test_features_are_the_forward_pass() -> None:
    model = timm.create_model("mixmae_swin_nano").eval()
    images = torch.randn(2, 3, 128, 128)
    final, maps = model.forward_intermediates(images)
    torch.testing.assert_close(final, model.forward_features(images))
    torch.testing.assert_close(model.norm(maps[-1].permute(0, 2, 3, 1)), final)


def test_windows_and_positions_follow_the_image() -> None:
    small = create_encoder("mixmae_swin_nano")
    large = create_encoder("mixmae_swin_nano", img_size=192, window_size=(12, 12, 12, 6))
    large.load_state_dict(large.fit_state_dict(small.state_dict()))
    assert large(torch.randn(1, 3, 192, 192)).shape == (1, 6, 6, 256)
    assert large.positions.shape == (48, 48, 32)


@pytest.mark.parametrize("side", [192, 96])
def test_another_input_size_is_that_of_a_model_made_for_it(side: int) -> None:
    model = create_encoder("mixmae_swin_nano")
    weights = model.state_dict()
    model.set_input_size(side)
    made = create_encoder(
        "mixmae_swin_nano", img_size=side, window_size=model.window_size, pretrain_img_size=model.position_size
    )
    made.load_state_dict(made.fit_state_dict(weights))
    images, groups = torch.randn(1, 3, side, side), torch.randint(0, 2, (side // 32, side // 32))
    assert torch.equal(model(images, groups), made(images, groups))


def test_swin_base_at_384_pixels_has_the_papers_windows() -> None:
    with torch.device("meta"):
        model = create_encoder("mixmae_swin_base_w14")
        model.set_input_size(384)
    assert model.window_size == (16, 16, 24, 12)


@pytest.mark.parametrize(
    ("side", "windows"), [(224, (14, 14, 14, 7)), (384, (16, 16, 24, 12)), (448, (14, 14, 14, 7)), (96, (12, 12, 6, 3))]
)
def test_windows_that_are_not_given_fit_the_image(side: int, windows: tuple[int, ...]) -> None:
    with torch.device("meta"):
        assert create_encoder("mixmae_swin_base_w14", img_size=side).window_size == windows


def test_oblong_images() -> None:
    encoder = create_encoder("mixmae_swin_nano", img_size=(128, 64), window_size=(4, 4, 4, 2))
    assert encoder(torch.randn(1, 3, 128, 64), torch.randint(0, 2, (4, 2))).shape == (1, 4, 2, 256)


@pytest.mark.parametrize(
    ("sizes", "advice"),
    [
        ({"img_size": 230}, "nearest that does is 224x224"),
        ({"img_size": 384, "window_size": (14, 14, 14, 7)}, r"set window_size=\[16,16,24,12\]"),
        ({"window_size": (7, 7)}, "expected 4"),
        ({"num_heads": (3, 6, 12, 24)}, "does not divide into 3 heads"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, object], advice: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=advice):
        create_encoder("mixmae_swin_base_w14", **sizes)


def test_grad_checkpointing_changes_nothing() -> None:
    torch.manual_seed(0)
    encoder = create_encoder("mixmae_swin_nano")
    images, groups = torch.randn(2, 3, 128, 128), torch.randint(0, 2, (4, 4))
    gradients = []
    for stages in ((), (1,), (2, 3, 4)):
        encoder.set_grad_checkpointing(stages=stages)
        assert isinstance(encoder, Swin)
        assert [stage.grad_checkpointing for stage in encoder.stages] == [i in stages for i in (1, 2, 3, 4)]
        encoder.zero_grad()
        encoder(images, groups).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None]))
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="mixmae_swin_base_w14"):
        create_encoder("swin_gigantic")


def test_encoder_of_the_registry_is_the_one_class() -> None:
    with torch.device("meta"):
        assert {type(timm.create_model(name)) for name in TABLE} == {Swin}


@pytest.mark.parametrize("kind", ["unmixed", "shared", "per sample", "shared, sizes unknown"])
def test_attention_in_kernels_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With formulas in place of the kernels, which are held against them elsewhere."""
    called = []

    def window_kernel(qkv: Tensor, table: Tensor, members: Tensor | None, scale: float) -> Tensor:
        called.append(None if members is None else len(members))
        return triton_cases.window_formula(qkv, table, members, scale)

    monkeypatch.setattr(window_attention, "window_attention", window_kernel)
    monkeypatch.setattr(grouped_attention, "grouped_attention", triton_cases.grouped_formula)
    encoder = create_encoder("mixmae_swin_nano")
    assert isinstance(encoder, Swin)
    images = torch.randn(3, 3, 128, 128)
    groups = (
        None if kind == "unmixed" else draw_groups(3 if kind == "per sample" else None, 2, (4, 4), torch.Generator())
    )
    num_groups = 2 if kind == "shared" else None
    results = []
    for fused in (False, True):
        if fused:
            assert encoder.set_fused_attention(torch.float32) == []
        out = encoder(images, groups, num_groups)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(encoder.parameters()))))
    for plain, fused_result in zip(*results, strict=True):
        torch.testing.assert_close(fused_result, plain, atol=1e-4, rtol=1e-4)
    # Without sizes of groups, global stages are windows with a mask.
    assert called == [{"unmixed": None, "per sample": 3}.get(kind, 1)] * (2 if kind == "shared" else 5)


def test_what_no_kernel_is_made_for_is_said() -> None:
    wide = create_encoder("mixmae_swin_nano", embed_dim=48, num_heads=(1, 2, 4, 8))
    assert wide.set_fused_attention() == [f"stage {n}: heads are 48 wide, expected 16 or 32" for n in (1, 2, 3, 4)]
    nano = create_encoder("mixmae_swin_nano", img_size=640, window_size=(8, 10, 20, 20))
    assert nano.set_fused_attention(torch.bfloat16) == [
        f"stage {n}: windows of 20x20 in torch.bfloat16, expected a side of 16 or less" for n in (3, 4)
    ]
    assert nano.set_fused_attention(torch.float32)[0].startswith("stage 2: windows of 10x10 in torch.float32")
    assert nano.set_fused_attention(torch.float32, windows=False) == []


def test_a_kernel_that_fails_on_a_gpu_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> Tensor:
        raise RuntimeError("out of resource: shared memory")

    def without_groups(qkv: Tensor, table: Tensor, _: Tensor | None, scale: float) -> Tensor:
        return triton_cases.window_formula(qkv, table, None, scale)

    def mixed_alone(qkv: Tensor, table: Tensor, members: Tensor | None, scale: float) -> Tensor:
        if members is None:
            raise RuntimeError("Return type mismatch")  # of what is compiled where groups are not kept apart
        return triton_cases.window_formula(qkv, table, members, scale)

    def without_gradients(qkv: Tensor, table: Tensor, members: Tensor | None, scale: float) -> Tensor:
        out = triton_cases.window_formula(qkv, table, members, scale)
        out.register_hook(lambda grad: grad * math.nan)
        return out

    attention = WindowAttention(32, 1, 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    cpu = torch.device("cpu")
    kernels: dict[Callable[[Tensor, Tensor, Tensor | None, float], Tensor], str] = {
        triton_cases.window_formula: "",
        failing: "the window kernel does not run on a GPU: out of resource: shared memory",
        mixed_alone: "the window kernel does not run on a GPU: Return type mismatch",
        without_groups: "the window kernel is off by ",
        without_gradients: "the window kernel is off by ",
    }
    for kernel, reason in kernels.items():
        attention.window_kernel = kernel
        found = try_kernel(attention, cpu)
        assert found.startswith(reason)
        assert bool(found) == bool(reason)


def test_where_the_window_kernel_fails_groups_go_without_theirs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are the same code; also where ranks agree to do without windows, and none is tried again."""
    tried = []

    def try_kernel(attention: WindowAttention, device: torch.device) -> str:
        tried.append(attention.window)
        return "the window kernel does not run"

    monkeypatch.setattr(layers, "try_kernel", try_kernel)
    monkeypatch.setattr(layers, "_tried", {})
    attention = WindowAttention(32, 1, 4)
    unchanged = SimpleNamespace(to=lambda dtype: attention)
    monkeypatch.setattr(layers, "copy", SimpleNamespace(deepcopy=lambda module: unchanged))  # fake weights have no data
    kernels = (triton_cases.grouped_formula, triton_cases.window_formula)
    assert attention.use_kernels(*kernels, torch.bfloat16) == ""
    assert (attention.kernel, attention.window_kernel) == kernels
    with FakeTensorMode():
        move(attention, on_gpu)
        for window_kernel in (kernels[1], None):
            assert attention.use_kernels(kernels[0], window_kernel, torch.bfloat16) == "the window kernel does not run"
            assert (attention.kernel, attention.window_kernel) == (None, None)
    assert tried == [4]
