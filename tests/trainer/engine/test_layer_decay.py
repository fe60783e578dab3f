"""Learning-rate scales by layer against the authors' parameter groups (tests/data/README.md), and of other encoders."""

import json

import pytest
import torch

from mixmae.models import create_encoder
from mixmae.models.heads.classification import add_linear_head
from mixmae.trainer.engine.layer_decay import layer_decay
from mixmae.trainer.engine.parameter_groups import parameter_groups
from mixmae.trainer.export.import_mixmim import convert
from tests.helpers import ROOT

REFERENCE = ROOT / "tests" / "data" / "mixmim_base_layer_decay.json"


def test_the_releases_groups() -> None:
    released = json.loads(REFERENCE.read_text())
    with torch.device("meta"):
        encoder = create_encoder("mixmae_swin_base_w14")
        add_linear_head(encoder, 1000)
    expected, _ = convert(released)
    scale_of = layer_decay(encoder, 0.7, "mixmim", "")
    groups = parameter_groups(encoder, 0.05, (), scale_of)
    found = {name: [group.lr_scale, group.weight_decay] for group in groups for name in group.names}
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values == pytest.approx(expected[name]), name


def test_other_rules_differ_where_they_should() -> None:
    with torch.device("meta"):
        encoder = create_encoder("mixmae_swin_nano")  # blocks 1, 1, 2, 1: n is 5
        add_linear_head(encoder, 10)
    names = [name for name, _ in encoder.named_parameters()]
    mixmim, standard, simmim = (layer_decay(encoder, 0.5, rule, "") for rule in ("mixmim", "standard", "simmim"))
    changed = {name: (mixmim(name), standard(name)) for name in names if mixmim(name) != standard(name)}
    assert changed == dict.fromkeys(("norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"), (0.5, 1.0))
    merging = {name: standard(name) / simmim(name) for name in names if simmim(name) != standard(name)}
    assert merging == {name: 2.0 for name in names if ".downsample." in name}
    assert (standard("patch_embed.proj.weight"), standard("stages.3.blocks.0.norm1.weight")) == (0.5**6, 0.5)
    assert standard("another.parameter") == 1.0


@pytest.mark.parametrize("name", ["mixmae_vit_nano", "mixmae_pvt_nano", "mixmae_twins_nano", "mixmae_resnet_nano"])
def test_every_encoders_rates_grow_from_image_to_head(name: str) -> None:
    with torch.device("meta"):
        encoder = create_encoder(name)
        add_linear_head(encoder, 10)
    scale_of = layer_decay(encoder, 0.5, "standard", "")
    blocks = [block for stage in range(1, encoder.num_stages + 1) for block in encoder.stage_blocks(stage)]
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    scales = [{scale_of(names[id(parameter)]) for parameter in block.parameters()} for block in blocks]
    assert scales == [{0.5 ** (len(blocks) - number)} for number in range(len(blocks))]
    assert scale_of("head.fc.weight") == 1.0
    assert all(scale_of(name) == 0.5 ** (len(blocks) + 1) for name in names.values() if name.startswith("patch_embed"))
