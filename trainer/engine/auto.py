"""Chooses what a recipe leaves to the hardware, by what this rank finds."""

import importlib.util
import logging
import os
import shutil

import torch

from mixmae.base.rank_env import RankEnv
from mixmae.trainer.recipe.hardware import fit_hardware
from mixmae.trainer.recipe.schema import Recipe

_logger = logging.getLogger(__name__)
_COMPILERS = ("cc", "gcc", "clang")


def fit_here(recipe: Recipe, ranks: RankEnv) -> Recipe:
    """The recipe as this rank runs it, see `fit_hardware`; the main rank says once what it has to do without."""
    if not torch.cuda.is_available():
        return fit_hardware(recipe, "cpu", ranks.world_size)
    missing = _missing_for_triton()
    wanted = "auto" in (recipe.train.compile, recipe.train.fused_attention)
    if missing is not None and wanted and ranks.is_main:
        _logger.warning("train.compile=auto, train.fused_attention=auto: off, which is slower: %s", missing)
    return fit_hardware(recipe, "cuda", ranks.world_size, with_triton=missing is None)


def _missing_for_triton() -> str | None:
    """What is not here of what kernels are compiled with."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing; pip install triton"
    if "CC" not in os.environ and not any(map(shutil.which, _COMPILERS)):
        return f"there is no C compiler ({', '.join(_COMPILERS)}); install one, or name it in CC"
    return None
