"""Encoders by name, registered with timm: `import mixmae`, then `timm.create_model("mixmae_swin_base_w14")`."""

import sys
from difflib import get_close_matches
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mixmae.models.encoders.contract import Encoder
from mixmae.models.layers.positions import resize_all_positions

_FIXED_SIZE = {"strict_img_size": True, "dynamic_img_size": False, "dynamic_img_pad": False}
ENCODERS: dict[str, tuple[type[Encoder], dict[str, Any]]] = {}
"""By name: the family, and the sizes that differ from its defaults."""


def register_encoder(name: str, family: type[Encoder], **sizes: Any) -> None:
    """Makes one size of a family known to timm and to recipes.

    Args:
        sizes: arguments of the family's constructor, where they differ from its defaults.
    """

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        _refuse_other_sizes(name, kwargs)
        model: nn.Module = build_model_with_cfg(
            family,
            name,
            pretrained,
            pretrained_filter_fn=_fit_state_dict,
            feature_cfg={"out_indices": tuple(range(family.num_stages)), "feature_cls": "getter"},
            **family.fit_sizes(sizes, kwargs),
        )
        return model

    # timm reads a model's name, and its facts, from the function and its module.
    create.__name__, create.__module__ = name, family.__module__
    module: Any = sys.modules[family.__module__]
    ENCODERS[name] = (family, sizes)
    module.default_cfgs = {
        **getattr(module, "default_cfgs", {}),
        **generate_default_cfgs({f"{name}.untrained": default_cfg(name)}),
    }
    register_model(create)


def default_cfg(
    name: str, img_size: int | tuple[int, int] | None = None, in_chans: int = 3, **facts: Any
) -> dict[str, Any]:
    """timm's pretrained_cfg of an encoder: how its input is made, what its parts are called; `facts` come last."""
    height, width = to_2tuple(img_size or default_img_size(name))
    stride = ENCODERS[name][0].stride
    return {
        "input_size": (in_chans, height, width),
        "fixed_input_size": True,
        "num_classes": 0,
        "pool_size": (height // stride, width // stride),
        # As the papers evaluate: 224 px of 256, or all of the image.
        "crop_pct": 0.875 if max(height, width) <= 224 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        # timm takes weights for those of 3 channels, and would begin the first convolution of others anew.
        "first_conv": ENCODERS[name][0].first_conv if in_chans == 3 else None,
        "classifier": "head.fc",
        **facts,
    }


def _refuse_other_sizes(name: str, arguments: dict[str, Any]) -> None:
    """Takes timm's arguments for images of any size; positions, and windows that are a whole map, are of one size.

    Raises:
        ValueError: one of them asks for it.
    """
    for argument, fixed in _FIXED_SIZE.items():
        if arguments.pop(argument, fixed) != fixed:
            raise ValueError(
                f"{argument}={not fixed}: {name} has positions and global attention of one image size; create it with "
                "img_size=..., or call set_input_size(...), which resizes them"
            )


def default_img_size(name: str) -> int:
    """Pixels along the side of the images that an encoder is made for; 224 for names that are not known."""
    side: int = ENCODERS[name][1].get("img_size", 224) if name in ENCODERS else 224
    return side


def family_of(name: str) -> tuple[type[Encoder], dict[str, Any]]:
    """An encoder's class, and the sizes that differ from its defaults.

    Raises:
        ValueError: an unknown name, with the nearest one.
    """
    if name not in ENCODERS:
        nearest = get_close_matches(name, ENCODERS, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"unknown encoder {name!r}; {hint}known: {', '.join(sorted(ENCODERS))}")
    return ENCODERS[name]


def create_encoder(name: str, **kwargs: Any) -> Encoder:
    """The encoder alone, features as a map [B, Gh, Gw, C]: what a method pretrains.

    Raises:
        ValueError: an unknown name, or sizes that do not fit each other.
    """
    family, _ = family_of(name)
    encoder = timm.create_model(name, num_classes=0, global_pool="", **kwargs)
    assert isinstance(encoder, family)
    return encoder


def _fit_state_dict(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    assert isinstance(model, Encoder)
    cfg: Any = model.pretrained_cfg
    height, width = cfg["input_size"][1:]  # of the images that the weights are for
    cells = height // model.stride, width // model.stride
    return model.fit_state_dict(resize_all_positions(model, state, cells, model.grid))
