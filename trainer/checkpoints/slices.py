"""Slices of weights and optimizer states that a rank holds, at any ZeRO stage.

DeepSpeed 0.19 keeps fp32 master weights of trained parameters per parameter (stage 0), in one flat tensor per parameter
group (stages 1 and 2), or in flat tensors of equal partitions of parameters (stage 3). Frozen parameters have the
model's precision and are replicated, except at stage 3, where each is split into equal partitions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixmae.base.errors import UsageError

WEIGHT, EMA = "weight", "ema"


@dataclass(frozen=True)
class ParameterSlice:
    """Elements [start, start + numel) of a flattened parameter.

    Attributes:
        source: tensor with the weights; fp32 if trained, and then the key of their optimizer states.
        offset: offset of the first element in the flattened `source`.
        replicated: whether every rank holds it.
    """

    name: str
    start: int
    numel: int
    source: Tensor
    offset: int
    frozen: bool = False
    replicated: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """A view of the slice's elements in a tensor with the shape of `source`."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


class ModelSlices:
    """A rank's share of an engine's weights and optimizer states.

    Attributes:
        shapes: shapes of all parameters, by name.
        frozen: names of the frozen parameters.
        held: the slices that this rank holds.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._zero = engine.optimizer
        self._optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self._stage: int = engine.zero_optimization_stage()
        parameters = dict(engine.module.named_parameters())
        self.shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
        self.frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
        self.held = [found for name, parameter in parameters.items() for found in self._find(name, parameter)]

    def _find(self, name: str, parameter: Any) -> Iterator[ParameterSlice]:
        frozen = not parameter.requires_grad
        if self._stage == 0 or (frozen and self._stage < 3):
            yield ParameterSlice(name, 0, parameter.numel(), parameter, 0, frozen, replicated=True)
        elif self._stage == 3:
            yield from self._partition(name, parameter, frozen)
        elif (mapping := parameter._hp_mapping) is not None:
            source = self._optimizer.param_groups[mapping.param_group_index]["params"][0]
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield ParameterSlice(name, here.start, here.numel, source, there.start)

    def _partition(self, name: str, parameter: Any, frozen: bool) -> Iterator[ParameterSlice]:
        if frozen:
            source, offset, padded = parameter.ds_tensor, 0, parameter.ds_tensor.ds_numel
        else:
            group, offset, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
            source = self._zero.fp32_partitioned_groups_flat[group]
        start = dist.get_rank() * padded
        numel = min(padded, parameter.ds_numel - start)
        if numel > 0:
            yield ParameterSlice(name, start, numel, source, offset, frozen)

    def to_write(self) -> dict[str, Tensor]:
        """The tensors that this rank saves, by key in its file; all ranks together save every element once."""
        tensors = {}
        for held in self.held:
            share = own_share(held) if held.replicated else held
            if share.numel > 0:
                for kind in (WEIGHT,) if share.frozen else (WEIGHT, *self._states):
                    tensors[f"{kind}/{share.name}@{share.start}"] = self._values(share, kind)
        return tensors

    def to_read(self, states: Sequence[str]) -> Iterator[tuple[ParameterSlice, str, Tensor]]:
        """Yields each slice to load, its kind (`WEIGHT` or the name of a state), and a view of its elements."""
        for held in self.held:
            for kind in (WEIGHT,) if held.frozen else (WEIGHT, *states):
                yield held, kind, self._values(held, kind)

    def _values(self, part: ParameterSlice, kind: str) -> Tensor:
        if kind == WEIGHT:
            return part.of(part.source)
        state = self._optimizer.state.get(part.source, {})
        if kind not in state:  # before the first step, or for a parameter that never had a gradient
            return torch.zeros(1, dtype=self._states[kind]).expand(part.numel)
        return part.of(state[kind])

    @property
    def optimizer_states(self) -> list[str]:
        """Names of the optimizer's state tensors of each parameter; none before its first step."""
        return list(self._states) if any(self._optimizer.state.values()) else []

    @property
    def optimizer_scalars(self) -> dict[str, float]:
        """The optimizer's scalar states, such as `step`; the maximum where parameters differ."""
        scalars: dict[str, float] = {}
        for state in self._optimizer.state.values():
            for name in state.keys() - self._states.keys():
                scalars[name] = max(float(state[name]), scalars.get(name, -torch.inf))
        return scalars

    @cached_property
    def _states(self) -> Mapping[str, torch.dtype]:
        """Dtypes of the optimizer's state tensors of each parameter, as they are after its first step."""
        states = ((source, state) for source, state in self._optimizer.state.items() if state and source.ndim > 0)
        source, state = next(states, None) or self._first_state()
        for name, value in state.items():
            if not isinstance(value, Tensor) or (value.shape != source.shape and value.ndim > 0):
                raise UsageError(
                    f"checkpoints hold optimizer states that are tensors of a parameter's shape, or scalars; {name} of "
                    f"{type(self._optimizer).__name__} is neither: choose another optimizer"
                )
        return {name: value.dtype for name, value in state.items() if value.shape == source.shape}

    def _first_state(self) -> tuple[Tensor, Mapping[str, Any]]:
        """Optimizer state after a first step, taken with a dummy parameter."""
        groups = self._optimizer.param_groups
        probe = nn.Parameter(torch.zeros(2, device=self.held[0].source.device))
        probe.grad = torch.zeros_like(probe)
        self._optimizer.param_groups = [{**groups[0], "params": [probe]}]
        self._optimizer.step()
        self._optimizer.param_groups = groups
        return probe, self._optimizer.state.pop(probe, {})

    def begin_load(self, states: Sequence[str], scalars: Mapping[str, float]) -> None:
        """Allocates the optimizer states to load; none if the optimizer had taken no step.

        Each weight tensor gets its own scalars: a shared step count would advance several times per step.
        """
        if self._stage == 3:
            self._zero.checkpoint_event_prologue()
        if not states and not scalars:
            return
        for source in {id(held.source): held.source for held in self.held if not held.frozen}.values():
            own_scalars = {
                name: torch.tensor(value, dtype=torch.float32, device=source.device) for name, value in scalars.items()
            }
            self._optimizer.state[source] = own_scalars | {name: torch.zeros_like(source.detach()) for name in states}

    def end_load(self) -> None:
        """Copies loaded master weights to the model, in its own precision. Collective."""
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            self._update_partitions()
            self._zero.checkpoint_event_epilogue()

    def _update_partitions(self) -> None:
        zero = self._zero
        for weights, flat in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
            flat.data.copy_(weights.data)
        for flat, parts in zip(zero.fp16_partitioned_groups_flat, zero.fp16_partitioned_groups, strict=True):
            for part, value in zip(parts, zero.unflatten(flat, parts), strict=True):
                part.data = value.data


def own_share(whole: ParameterSlice) -> ParameterSlice:
    """The slice that this rank saves of a replicated parameter."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    low, high = whole.numel * rank // world_size, whole.numel * (rank + 1) // world_size
    return ParameterSlice(whole.name, low, high - low, whole.source, low, whole.frozen)
