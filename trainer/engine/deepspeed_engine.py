"""Builds the DeepSpeed engine around a model: its configuration, then the engine."""

import contextlib
import importlib
import io
import logging
import os
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch

from mixmae.base.errors import UsageError
from mixmae.models.contract import Trainable
from mixmae.trainer.engine.activation_checkpointing import checkpoint_activations
from mixmae.trainer.engine.auto import fit_here
from mixmae.trainer.engine.cpu import Bf16Matmuls, apply_cpu_workarounds
from mixmae.trainer.engine.distributed import Ranks, all_gather
from mixmae.trainer.engine.optimizer import OptimizerChoice, build_optimizer
from mixmae.trainer.recipe.hardware import Device, fit_hardware
from mixmae.trainer.recipe.schema import Recipe

_logger = logging.getLogger(__name__)
_BUCKET = 100_000_000
"""Elements reduced at once: DeepSpeed's own default is one bucket for a whole model of 500 M parameters."""


def deepspeed_config(recipe: Recipe, world_size: int, device: Device | None = None) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe.

    Args:
        device: of the ranks, for what the recipe leaves to it; None for this machine's.

    Raises:
        UsageError: the batch does not divide.
    """
    train = fit_hardware(recipe, device or ("cuda" if torch.cuda.is_available() else "cpu"), world_size).train
    config: dict[str, Any] = {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": recipe.accumulation(world_size),
        "steps_per_print": None,
        "zero_optimization": {
            "stage": train.stage,
            "reduce_bucket_size": _BUCKET,
            # With contiguous gradients it gave NaN until DeepSpeed 0.19.8, which waits for all streams (#8061).
            "overlap_comm": train.overlap_comm,
            "contiguous_gradients": True,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        # It waits for the GPU twice in each micro-step, and the loop has a clock of its own that does not.
        "timers": {"throughput": {"enabled": False}},
    }
    if (wandb := recipe.log.wandb) is not None:
        config["wandb"] = {"enabled": True, "project": wandb.project, "group": wandb.group, "team": wandb.entity}
    if recipe.monitoring.comms_logger:  # DeepSpeed turns it on wherever the section stands, whatever it says
        config["comms_logger"] = {"enabled": True, "verbose": False, "prof_all": True}
    if train.stage == 0:
        # At this stage the optimizer clips by itself (`non_finite`); DeepSpeed's own default is to clip to a norm of 1.
        config["gradient_clipping"] = 0.0
        return config
    config["zero_allow_untested_optimizer"] = True  # the optimizer itself says whether ZeRO may split its parameters
    config["gradient_clipping"] = recipe.optim.clip_grad or 0.0
    # Stage 1 adds each gradient to its fp32 sum when it is there, not one by one behind the backward pass.
    config["bf16"] = {"enabled": train.precision == "bf16", "immediate_grad_update": True}
    if train.precision == "bf16":
        config["communication_data_type"] = train.communication_dtype
    if train.stage == 3:
        # Keeps stage 3 equal to stage 2 to the bit.
        config["zero_optimization"]["memory_efficient_linear"] = False
        config["zero_optimization"]["allgather_bucket_size"] = _BUCKET
    return config


def compile_parts(model: Trainable, **options: Any) -> None:
    """Compiles each block, and what else the model names, by itself; shapes are static, and blocks of one shape share
    their code.

    Args:
        options: more of `torch.compile`.
    """
    # All blocks are one function to torch, which gives up at 8 shapes and modes of it: five stages, each trained and
    # evaluated, are more.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for part in chain(*model.block_groups().values(), model.compiled_parts()):
        part.compile(fullgraph=True, dynamic=False, **options)


def fuse_attention(model: Trainable, dtype: torch.dtype, ranks: Ranks) -> None:
    """Attention in kernels, on all ranks alike: where one's GPU does not run that of windows, none takes it. The main
    rank says what goes without."""
    found = all_gather(model.set_fused_attention(dtype))
    if any(reasons != found[0] for reasons in found):
        model.set_fused_attention(dtype, windows=False)
    if ranks.is_main:
        for reason in dict.fromkeys(chain(*found)):
            _logger.warning("train.fused_attention: torch's attention is taken, which is slower: %s", reason)


def import_muon() -> None:
    """Imports the optimizer that DeepSpeed compares every other with, without compiling it.

    It is decorated with torch.compile, which would load all of torch's compiler: two seconds of every rank's start.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE", "0")  # torch.compile reads it at each call
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    os.environ["TORCHDYNAMO_DISABLE"] = before


def build_engine(
    model: Trainable,
    recipe: Recipe,
    ranks: Ranks,
    choice: OptimizerChoice | None = None,
    lr_scale_of: Callable[[str], float] | None = None,
    matmuls: Bf16Matmuls | None = None,
) -> Any:
    """DeepSpeed's engine around the model, its optimizer and its precision.

    Args:
        choice, lr_scale_of: the task's, see `build_optimizer`.
        matmuls: how a bf16 model multiplies on a CPU; None for what is faster.
    """
    import deepspeed

    import_muon()
    recipe = fit_here(recipe, ranks)
    config = deepspeed_config(recipe, ranks.world_size)
    checkpoint_activations(model, recipe.train.activation_checkpointing)
    model.to(ranks.device)
    if recipe.train.precision == "bf16" and ranks.device.type == "cpu":
        apply_cpu_workarounds(model, matmuls)
    if recipe.train.fused_attention:
        if ranks.device.type != "cuda":
            raise UsageError("train.fused_attention=true needs a GPU, and this rank has none; set it to false")
        fuse_attention(model, torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32, ranks)
    if recipe.train.compile:
        compile_parts(model)
    with contextlib.redirect_stdout(io.StringIO()):  # one of its optimizers prints memory figures while it is made
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(recipe, model, choice, lr_scale_of),
            config=config,
            dist_init_required=False,
        )
    return engine
