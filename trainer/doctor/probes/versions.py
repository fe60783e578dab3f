"""Software versions of a host, including a hash of the project's sources."""

import hashlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import torch

from mixmae.base.software import versions

SOURCES = "mixmae's sources"
_PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "CUDA_", "OMP_", "DS_", "UCX_", "FI_", "LD_", "PYTHONPATH")
_BY_RANK = ("CUDA_VISIBLE_DEVICES",)
"""Launchers set these for each rank."""


def software(drivers: Mapping[str, str]) -> dict[str, str]:
    """Versions by name: packages, torch's CUDA and NCCL, drivers, and a hash of the project's sources."""
    built = {"CUDA": torch.version.cuda or "none"}
    if torch.cuda.is_available():
        built["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {**versions(), **built, **drivers, SOURCES: fingerprint_of(_packages())}


def fingerprint_of(folders: list[Path]) -> str:
    """Hash of all Python files below the folders; 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{folder.name}/{file.relative_to(folder)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _packages() -> list[Path]:
    return sorted(folder for folder in Path(str(files("mixmae"))).iterdir() if folder.is_dir())


def relevant(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that affect computation or communication."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(_PREFIXES) and name not in _BY_RANK
    }
