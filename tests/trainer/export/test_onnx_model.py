"""ONNX files in onnxruntime, against torch."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from mixmae.base.errors import UsageError
from mixmae.trainer.export import onnx_model
from mixmae.trainer.export.encoder_directory import write_encoder_directory
from mixmae.trainer.export.onnx_model import ONNX, require_onnx, write_onnx
from tests.helpers import needs_onnx

FAMILIES = ["swin", "vit", "pvt", "twins", "resnet"]


def written(family: str, folder: Path) -> nn.Module:
    """The model whose encoder directory, with an ONNX file, is `folder`."""
    needs_onnx()
    torch.manual_seed(0)
    name = f"mixmae_{family}_nano"
    model: nn.Module = timm.create_model(name, num_classes=10).eval()
    write_encoder_directory(folder, name, {}, model.state_dict(), extend=write_onnx)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_onnxruntime_computes_what_torch_does(tmp_path: Path, family: str) -> None:
    model = written(family, tmp_path / "encoder")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "encoder" / ONNX), providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("images", ["batch", 3, 128, 128])
    assert (made.name, made.shape) == ("logits", ["batch", 10])
    for batch in (1, 4):
        images = torch.randn(batch, 3, 128, 128)
        (logits,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images), atol=1e-4, rtol=0)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    with pytest.raises(RuntimeError, match=r"differs from torch by .* at most 0.0001 was expected"):
        onnx_model._check(tmp_path / "encoder" / ONNX, model)


@pytest.mark.slow
def test_weights_too_large_for_protobuf_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_model, "_ONE_FILE", 0)
    model = written("vit", tmp_path / "made")
    (tmp_path / "made").rename(tmp_path / "moved")
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    beside = (tmp_path / "moved" / f"{ONNX}.data").stat().st_size
    assert beside > 0.95 * weights > (tmp_path / "moved" / ONNX).stat().st_size  # norms and biases may stay inside
    onnx_model._check(tmp_path / "moved" / ONNX, model)


def test_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_model, "_PACKAGES", ("onnx", "onnxfoo"))
    with pytest.raises(UsageError, match=r"^--format onnx needs onnxfoo; .* pip install 'mixmae\[onnx\]'$"):
        require_onnx()
