"""Small teachers, as directories of timm's with random weights."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


@cache
def small_teacher() -> str:
    """One for this process, whose grid at 128 px is that of encoders of 32 px cells."""
    return f"local-dir:{write_teacher(Path(tempfile.mkdtemp(prefix='teacher-')) / 'vit')}"


def write_teacher(folder: Path, **sizes: Any) -> Path:
    """A directory of timm's, of a ViT whose images are normalised as no others are."""
    sizes = {"img_size": 128, "patch_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, **sizes}
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):  # also for tests on the meta device
        torch.manual_seed(5)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    size = [3, sizes["img_size"], sizes["img_size"]]
    facts = {"input_size": size, "mean": MEAN, "std": STD, "num_classes": 0, "fixed_input_size": True}
    content = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": sizes, "pretrained_cfg": facts}
    (folder / "config.json").write_text(json.dumps(content))
    return folder
