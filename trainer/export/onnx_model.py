"""The forward pass of an encoder directory in ONNX, checked in onnxruntime against torch.

Input `images` [batch, 3, H, W], fp32, normalised as config.json says: one size, any batch. Output as of the timm model:
`features` [batch, C], pooled, or `logits` [batch, classes].
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixmae.base.errors import UsageError
from mixmae.trainer.export.encoder_directory import load_encoder

ONNX = "model.onnx"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_TOLERANCE = 1e-4
_ONE_FILE = 2**31 - 2**24
"""Bytes of weights up to which they lie in the file itself, as protobuf can; larger ones beside it (`.data`)."""


def require_onnx() -> None:
    """Raises UsageError unless the packages for ONNX are installed."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(f"--format onnx needs {', '.join(missing)}; install them with: pip install 'mixmae[onnx]'")


def write_onnx(directory: Path) -> None:
    """Adds `model.onnx` to an encoder directory.

    Raises:
        RuntimeError: onnxruntime does not compute what torch does.
    """
    model = load_encoder(directory).eval()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    torch.onnx.export(
        model,
        (_images(model, 2),),
        directory / ONNX,
        dynamo=True,
        verbose=False,
        external_data=weights > _ONE_FILE,
        input_names=["images"],
        output_names=["logits" if model.num_classes else "features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    _check(directory / ONNX, model)


def _images(model: nn.Module, batch: int) -> torch.Tensor:
    facts: Any = model.pretrained_cfg
    return torch.randn(batch, *facts["input_size"], generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def _check(file: Path, model: nn.Module) -> None:
    """Compares batches of other sizes than the one that was traced."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = _images(model, batch)
        expected = model(images)
        (found,) = session.run(None, {"images": images.numpy()})
        error = (torch.from_numpy(found) - expected).abs().max() / expected.abs().max().clamp(min=1)
        if error > _TOLERANCE:
            raise RuntimeError(
                f"{file}: onnxruntime {onnxruntime.__version__} differs from torch by {error:.2g} for a batch of "
                f"{batch}; at most {_TOLERANCE} was expected"
            )
