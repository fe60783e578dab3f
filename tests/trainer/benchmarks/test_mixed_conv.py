from functools import partial

import pytest
import torch

from mixmae.models.layers.mixed_cells import Mix
from mixmae.models.layers.mixed_conv import MixedConv2d, StandardisedConv2d
from mixmae.models.layers.mixed_norm import MixedGroupNormReLU
from mixmae.models.methods.mixing import draw_groups
from mixmae.trainer.benchmarks.mixed_conv import LAYERS, Layer, MaxPool, measure, partial_convolutions, table

SMALL = {
    "convolution": Layer(partial(StandardisedConv2d, 4, 4, 3, 2), 28, 4),
    "pooling": Layer(MaxPool, 28, 4),
    "norm": Layer(partial(MixedGroupNormReLU, 2, 4), 7, 4),
}


@pytest.mark.parametrize("depthwise", [False, True])
def test_what_mixed_convolutions_are_measured_against_computes_the_same(depthwise: bool) -> None:
    torch.manual_seed(0)
    conv, x = MixedConv2d(8, 8, 3, depthwise=depthwise), torch.randn(2, 14, 14, 8)
    groups = draw_groups(None, 3, (7, 7), torch.Generator().manual_seed(0))
    torch.testing.assert_close(partial_convolutions(conv, x, groups, 3), conv(x, Mix.of(groups)), atol=1e-5, rtol=1e-5)


def test_layers_are_compared_in_one_table() -> None:
    rows = [measure(name, layer, 1, "fp32", 1, torch.device("cpu")) for name, layer in SMALL.items()]
    for row in rows:
        assert {"plain", "mixed 2", "mixed 4"} <= row.keys()
        assert ("partial 2" in row) == (row["layer"] == "convolution")
        assert all(found["ms"] > 0 and found["bytes"] > 0 for key, found in row.items() if key != "layer")
    lines = table({"layers": rows}).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in SMALL]
    assert len({line.count("|") for line in lines}) == 1


def test_layers_are_those_of_the_encoders() -> None:
    for layer in LAYERS.values():
        with torch.device("meta"):
            assert layer.make()(torch.empty(1, layer.side, layer.side, layer.dim)).dim() == 4
