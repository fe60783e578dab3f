"""One train step: forward, backward and optimizer step of a global batch, and all that is random about it."""

import torch
from torch import Tensor

from mixmae.trainer.data.batch_reader import Batch
from mixmae.trainer.data.rng import Purpose, seed_at, torch_at
from mixmae.trainer.data.to_device import copy_to_device
from mixmae.trainer.engine.non_finite import refuse_non_finite
from mixmae.trainer.engine.parameter_groups import set_lr
from mixmae.trainer.run.context import Run


def train_step(run: Run) -> tuple[Tensor, list[list[int]], Batch]:
    """One optimizer step; returns losses [accumulation] on the device, their samples, and the last micro-batch."""
    engine, state, clock = run.engine, run.state, run.observer.clock
    set_lr(engine.optimizer, run.schedule.lr(state.step))
    losses, samples = [], []
    for micro_step in range(run.recipe.accumulation(run.ranks.world_size)):
        with clock.phase("data_wait"):
            batch = next(run.batches)
        with clock.phase("forward"):
            images = run.to_device(batch.images)
            inputs = inputs_of(run, batch, micro_step)
            torch.manual_seed(seed_at(Purpose.DROP_PATH, *rng_key(run, micro_step)))
            loss = engine(images, *inputs)
        with clock.phase("backward"):
            engine.backward(refuse_non_finite(loss))
        with clock.phase("optimizer"):
            engine.step()
        losses.append(loss.detach())
        samples.append(batch.samples)
    return torch.stack(losses), samples, batch


def rng_key(run: Run, micro_step: int) -> tuple[int, int, int]:
    """Seed, step, and which micro-batch of the global batch: the key of all randomness in it, whoever computes it."""
    accumulation = run.recipe.accumulation(run.ranks.world_size)
    return run.recipe.seed, run.state.step, run.ranks.rank * accumulation + micro_step


def inputs_of(run: Run, batch: Batch, micro_step: int) -> list[Tensor]:
    """What the module takes beside this rank's images, on its device."""
    generator = torch_at(Purpose.INPUTS, *rng_key(run, micro_step))
    inputs = run.task.inputs(run.engine.module, batch, generator)
    return [copy_to_device(tensor, run.ranks.device) for tensor in inputs]
