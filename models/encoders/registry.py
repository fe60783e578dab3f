"""Encoders by name, registered with timm: `import models`, then `timm.create_model("mixmae_swin_base_w14")`."""

from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resize_rel_pos_bias_table_simple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mixmae.models.encoders.swin import Swin

# Sizes of the paper (section 3.2); windows for 224 px. `nano` is this project's own, for demonstrations and tests.
SIZES: dict[str, dict[str, Any]] = {
    "mixmae_swin_nano": {
        "img_size": 128,
        "embed_dim": 32,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 4, 8),
        "window_size": (8, 8, 8, 4),
    },
    "mixmae_swin_base": {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "window_size": (7, 7, 14, 7)},
    "mixmae_swin_base_w14": {"embed_dim": 128, "num_heads": (4, 8, 16, 32)},
    "mixmae_swin_large": {"embed_dim": 192, "num_heads": (6, 12, 24, 48)},
    "mixmae_swin_huge": {"embed_dim": 352, "num_heads": (11, 22, 44, 88)},
}


def default_cfg(name: str, img_size: int | None = None, **facts: Any) -> dict[str, Any]:
    """timm's pretrained_cfg of an encoder: how its input is made, what its parts are called; `facts` come last."""
    side = img_size or SIZES[name].get("img_size", 224)
    return {
        "input_size": (3, side, side),
        "fixed_input_size": True,
        "num_classes": 0,
        "pool_size": (side // 32, side // 32),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        **facts,
    }


default_cfgs = generate_default_cfgs({f"{name}.untrained": default_cfg(name) for name in SIZES})


def fit_to_model(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resizes relative-position tables to the model's windows (bicubic), for another image or window size."""
    own = model.state_dict()
    fitted = dict(state)
    for key, table in state.items():
        if key.endswith("relative_position_bias_table") and key in own and table.shape != own[key].shape:
            window = (int(own[key].shape[0] ** 0.5) + 1) // 2
            fitted[key] = resize_rel_pos_bias_table_simple(table, (window, window), tuple(own[key].shape))
    return fitted


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    model: nn.Module = build_model_with_cfg(
        Swin,
        variant,
        pretrained,
        pretrained_filter_fn=fit_to_model,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**SIZES[variant], **kwargs},
    )
    return model


@register_model
def mixmae_swin_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create("mixmae_swin_nano", pretrained, kwargs)


@register_model
def mixmae_swin_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create("mixmae_swin_base", pretrained, kwargs)


@register_model
def mixmae_swin_base_w14(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create("mixmae_swin_base_w14", pretrained, kwargs)


@register_model
def mixmae_swin_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create("mixmae_swin_large", pretrained, kwargs)


@register_model
def mixmae_swin_huge(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create("mixmae_swin_huge", pretrained, kwargs)


def create_encoder(name: str, **kwargs: Any) -> Swin:
    """The encoder alone, features as a map [B, H/32, W/32, C]: what MixMAE pretrains.

    Raises:
        ValueError: an unknown name, or sizes that do not fit each other.
    """
    if name not in SIZES:
        raise ValueError(f"unknown encoder {name!r}; known: {', '.join(SIZES)}")
    encoder = timm.create_model(name, num_classes=0, global_pool="", **kwargs)
    assert isinstance(encoder, Swin)
    return encoder
