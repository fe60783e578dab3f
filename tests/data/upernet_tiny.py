"""Writes upernet_tiny.safetensors: `pip install transformers==5.24.0`, then `python tests/data/upernet_tiny.py`."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

WIDTHS = [6, 8, 10, 12]
"""Channels of the maps."""
SIDE = 12
"""Of the first map."""


def main() -> None:
    torch.manual_seed(0)
    config = UperNetConfig(hidden_size=8, num_labels=5, auxiliary_channels=256)
    heads = {"decode_head": UperNetHead(config, WIDTHS), "auxiliary_head": UperNetFCNHead(config, WIDTHS)}
    model = nn.ModuleDict(heads)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5) if name.endswith(("norm.weight", "running_var")) else value.normal_(std=0.2)
    tensors = {f"state.{name}": value.clone() for name, value in model.state_dict().items() if value.ndim}
    maps = [torch.randn(3, width, SIDE >> level, SIDE >> level) for level, width in enumerate(WIDTHS)]
    tensors |= {f"map{level}": x for level, x in enumerate(maps)}
    for mode in ("eval", "train"):  # training changes running statistics, and so comes last
        model.train(mode == "train")
        tensors |= {f"{mode}.{name}": logits(head, maps) for name, head in heads.items()}
    tensors |= {f"after.{name}": value for name, value in model.state_dict().items() if "running" in name}
    sizes = json.dumps({"widths": WIDTHS, "width": config.hidden_size, "classes": config.num_labels})
    save_file(tensors, Path(__file__).with_suffix(".safetensors"), {"config": sizes})


@torch.no_grad()
def logits(head: nn.Module, maps: list[Tensor]) -> Tensor:
    return head(maps)


if __name__ == "__main__":
    main()
