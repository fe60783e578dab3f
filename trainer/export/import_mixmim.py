"""`mixmae import FILE OUT`: the authors' released MixMIM checkpoints, as an encoder directory of ours.

Their files hold `{"model": state_dict, ...}`, of two kinds: pretraining (encoder and decoder) and fine-tuned (encoder
and classifier). Sizes are read off the shapes.
"""

import argparse
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.models.encoders.contract import Encoder
from mixmae.models.encoders.registry import ENCODERS, create_encoder
from mixmae.models.encoders.swin import Swin
from mixmae.models.layers.blocks import resized_positions, sincos_positions
from mixmae.models.methods.decoder import Decoder
from mixmae.trainer.export.encoder_directory import misfits, require_finite, write_encoder_directory
from mixmae.trainer.export.torch_file import read_torch_file

_BLOCK = (
    r"(?:norm[12]\.(?:weight|bias)|attn\.(?:qkv|proj)\.(?:weight|bias)|mlp\.fc[12]\.(?:weight|bias)"
    r"|attn\.relative_position_bias_table)"
)
# Released name -> our name; their patch merging closes a stage, ours opens the next one (group 1 plus one).
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"(patch_embed\.(?:proj|norm)\.(?:weight|bias))", r"encoder.\1"),
    (rf"layers\.(\d)\.blocks\.(\d+)\.({_BLOCK})", r"encoder.stages.\1.blocks.\2.\3"),
    (r"norm\.(weight|bias)", r"encoder.norm.\1"),
    (r"head\.(weight|bias)", r"encoder.head.fc.\1"),
    (r"mask_token", r"decoder.mask_token"),
    (r"decoder_(embed|norm|pred)\.(weight|bias)", r"decoder.\1.\2"),
    (rf"decoder_blocks\.(\d+)\.({_BLOCK})", r"decoder.blocks.\1.\2"),
)
_MERGING = re.compile(r"layers\.(\d)\.downsample\.(norm\.weight|norm\.bias|reduction\.weight)")
_FIXED = {"absolute_pos_embed", "decoder_pos_embed"}
_COARSEST = 8
"""Patches along a cell's side: grids have a multiple of them."""
_INDEX = re.compile(r"(?:layers\.\d\.blocks\.\d+\.attn\.relative_position_index|layers\.\d\.blocks\.\d+\.attn_mask)")


def convert(released: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The encoder's and the decoder's state dict (None in a fine-tuned file) of a released state dict.

    Raises:
        UsageError: names we do not know, or positions that are not the fixed sin-cos ones.
    """
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    foreign, fixed = [], {}
    for name, value in released.items():
        if name in _FIXED:
            fixed[name] = value
        elif (ours := _our_name(name)) is not None:
            part, key = ours.split(".", 1)
            parts[part][key] = value
        elif not _INDEX.fullmatch(name):
            foreign.append(name)
    if foreign:
        raise UsageError(
            f"{len(foreign)} names are not of a released MixMIM Swin checkpoint, the first is "
            f"{foreign[0]!r}; expected names such as 'layers.0.blocks.0.attn.qkv.weight'"
        )
    for name, value in fixed.items():
        position_grid(name, value)
    return parts["encoder"], parts["decoder"] or None


def sizes(encoder: dict[str, Tensor], image_positions: Tensor | None) -> dict[str, Any]:
    """The encoder's constructor arguments, from the shapes of its weights."""
    depths = [len({k.split(".")[3] for k in encoder if k.startswith(f"stages.{i}.blocks.")}) for i in range(4)]
    tables = [encoder[f"stages.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(4)]
    found: dict[str, Any] = {
        "embed_dim": encoder["patch_embed.proj.weight"].shape[0],
        "depths": tuple(depths),
        "num_heads": tuple(table.shape[1] for table in tables),
        "window_size": tuple((int(table.shape[0] ** 0.5) + 1) // 2 for table in tables),
    }
    patch = encoder["patch_embed.proj.weight"].shape[-1]
    if image_positions is None:
        return {**found, "img_size": found["window_size"][3] * _COARSEST * patch}
    side, grid = int(image_positions.shape[1] ** 0.5), position_grid("absolute_pos_embed", image_positions)
    resized = {} if grid == side else {"pretrain_img_size": grid * patch}
    return {**found, "img_size": side * patch, **resized}


def name_size(found: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The registered architecture of these sizes, and the arguments that differ from its defaults."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(Swin).parameters.items()}
    candidates = {
        name: {k: v for k, v in found.items() if {**defaults, **size}[k] != v}
        for name, (family, size) in ENCODERS.items()
        if family is Swin
    }
    name = min(candidates, key=lambda n: (len(candidates[n]), n == "mixmae_swin_nano"))
    return name, candidates[name]


def _our_name(name: str) -> str | None:
    if merging := _MERGING.fullmatch(name):
        return f"encoder.stages.{int(merging[1]) + 1}.downsample.{merging[2]}"
    for pattern, ours in _RENAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    return None


def position_grid(name: str, table: Tensor) -> int:
    """Side of the grid of sin-cos positions that a table [1, L, C] holds, perhaps resized to its own, as the release's
    models for 384 px have those of 224 px.

    Raises:
        UsageError: the table is something else.
    """
    side = int(table.shape[1] ** 0.5) if table.dim() == 3 else 0
    if table.dim() == 3 and table.shape[1] == side**2 and table.shape[2] % 4 == 0:
        for grid in (side, *range(_COARSEST, side, _COARSEST)):
            expected = resized_positions(sincos_positions((grid, grid), table.shape[2]), (side, side))
            if torch.allclose(table[0].float(), expected.flatten(0, 1), atol=1e-3):
                return grid
    raise UsageError(f"{name} is not the fixed sin-cos table that the released models use; this file was changed")


def read_release(file: Path) -> dict[str, Tensor]:
    """The state dict in a released file, in fp32.

    Raises:
        UsageError: no file, not a checkpoint, or no tensors under "model".
    """
    content = read_torch_file(file)
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UsageError(f"{file} has no state dict under 'model'; expected a released MixMIM checkpoint")
    state = {name: value for name, value in state.items() if not _INDEX.fullmatch(name)}
    require_finite(state, str(file))
    return {name: value.float() for name, value in state.items()}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae import", description="Convert a released MixMIM checkpoint.")
    parser.add_argument("file", type=Path, help="released checkpoint (.pth)")
    parser.add_argument("out", type=Path, help="encoder directory to write")
    args = parser.parse_args(argv)
    released = read_release(args.file)
    encoder, decoder = convert(released)
    if missing := sorted(_SIZED.keys() - encoder.keys()):
        raise UsageError(f"{args.file} lacks {missing[0]!r} (and {len(missing) - 1} more) of a MixMIM encoder")
    for weight, dimensions in _SIZED.items():
        if encoder[weight].dim() != dimensions:
            raise UsageError(f"{args.file}: {weight!r} has {encoder[weight].dim()} dimensions, expected {dimensions}")
    name, model_args = name_size(sizes(encoder, released.get("absolute_pos_embed")))
    _check_complete(args.file, name, model_args, encoder, decoder)
    method = None if decoder is None else ("mixmae", {f"decoder.{key}": value for key, value in decoder.items()})
    write_encoder_directory(args.out, name, model_args, encoder, method, {"source": args.file.name})
    kind = "fine-tuned" if decoder is None else "pretraining"
    print(
        f"{args.out}: {kind} checkpoint, {name}, {sum(v.numel() for v in encoder.values()) / 1e6:.1f} M parameters "
        f"in the encoder\nopen it with: import mixmae, timm; timm.create_model('local-dir:{args.out}', pretrained=True)"
    )
    return 0


_SIZED = {
    "patch_embed.proj.weight": 4,
    "norm.weight": 1,
    **{f"stages.{stage}.blocks.0.attn.relative_position_bias_table": 2 for stage in range(4)},
}
"""The weights from which sizes are read, and their dimensions."""


def _check_complete(
    file: Path, name: str, model_args: dict[str, Any], encoder: dict[str, Tensor], decoder: dict[str, Tensor] | None
) -> None:
    """Raises UsageError unless the weights are exactly those of models of these sizes."""
    try:
        with torch.device("meta"):
            own = create_encoder(name, **model_args)
            found = {f"encoder.{k}": v for k, v in encoder.items() if not k.startswith("head.")}
            expected = {f"encoder.{k}": v for k, v in own.state_dict().items()}
            if decoder is not None:
                found |= {f"decoder.{k}": v for k, v in decoder.items()}
                expected |= {f"decoder.{k}": v for k, v in _decoder_like(own, decoder).state_dict().items()}
    except (ValueError, ArithmeticError, IndexError) as error:
        raise UsageError(f"{file} holds weights of sizes that do not fit each other: {error}") from error
    wrong = misfits(found, expected)
    if wrong:
        raise UsageError(
            f"{file}: {len(wrong)} weights are missing, foreign or of another shape, the first is {wrong[0]!r}"
        )


def _decoder_like(encoder: Encoder, decoder: dict[str, Tensor]) -> Decoder:
    if "mask_token" not in decoder:
        raise ValueError("no mask_token beside the decoder's weights")
    depth = len({key.split(".")[1] for key in decoder if key.startswith("blocks.")})
    return Decoder(
        encoder.num_features, encoder.grid, 3 * encoder.stride**2, decoder["mask_token"].shape[-1], depth, num_heads=1
    )
