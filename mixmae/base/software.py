"""Which software a run uses, for its record and for the doctor."""

import importlib.metadata
import platform

PACKAGES = (
    "mixmae",
    "torch",
    "torchvision",
    "timm",
    "deepspeed",
    "fairscale",
    "webdataset",
    "numpy",
    "pillow",
    "simplejpeg",
)


def versions() -> dict[str, str]:
    """What a run ran with."""
    found = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "machine": platform.machine(), **found}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path, or an environment without an optional one
        return "not installed"
