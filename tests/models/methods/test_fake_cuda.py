"""Every method on every encoder on a GPU that is not there: torch traces the forward pass on a fake CUDA device.

Whatever reads a value back to the host, or mixes devices, raises. The backward pass asks for a real CUDA context; on
the meta device it shows that nothing is read back, and not that devices match.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from mixmae.models.methods.contract import Method
from tests.models.fake_gpu import NoFixedOrder, move, on_gpu
from tests.models.methods.test_contract import BATCH, COMBINATIONS, SIZE, build, drawn

OF_THE_METHODS = [("swin", "mixmae"), ("swin", "simmim"), ("swin", "mae"), ("vit", "mae")]


def on_meta(family: str, method: str) -> Method:
    with torch.device("meta"):
        return build(family, method)


@pytest.mark.parametrize(("family", "method"), COMBINATIONS)
def test_a_forward_pass_reads_nothing_back_and_mixes_no_devices(family: str, method: str) -> None:
    model = on_meta(family, method)
    inputs = drawn(model, 0)
    with FakeTensorMode(allow_non_fake_inputs=False):
        for module in (model, *model.frozen_models()):
            move(module, on_gpu)
        images = torch.empty(BATCH, 3, SIZE, SIZE, device="cuda")
        loss = model(images, *(torch.empty(part.shape, dtype=part.dtype, device="cuda") for part in inputs))
        assert (loss.device.type, loss.dtype, loss.shape) == ("cuda", torch.float32, ())


@pytest.mark.parametrize(
    ("family", "method"),
    [
        names if names in OF_THE_METHODS or names[1] == "mixmae" else pytest.param(*names, marks=pytest.mark.slow)
        for names in COMBINATIONS
    ],
)
def test_a_backward_pass_reads_nothing_back_and_has_a_fixed_order(family: str, method: str) -> None:
    model = on_meta(family, method)
    inputs = [part.to("meta") for part in drawn(model, 0)]
    with NoFixedOrder() as order:
        model(torch.empty(BATCH, 3, SIZE, SIZE, device="meta"), *inputs).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert order.found == set()  # else train.deterministic=true would end a run on GPUs


def test_a_fake_device_notices() -> None:
    """A control for the tests above."""
    with FakeTensorMode():
        x = torch.empty(3, device="cuda")
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            x.nonzero()
        with pytest.raises(RuntimeError, match=r"same device|different devices"):
            x + torch.empty(3)
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty((), device="meta").item()
