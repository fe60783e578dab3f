import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from mixmae.models import MixMAE, create_encoder
from mixmae.models.encoders.registry import ENCODERS
from mixmae.models.encoders.swin import Swin

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


@pytest.mark.parametrize("name", [name for name in ENCODERS if name.startswith("mixmae_swin")])
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
        ({"img_size": 384, "window_size": (14, 14, 14, 7)}, r"\(16, 16, 24, 12\) would fit"),
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
