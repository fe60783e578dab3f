"""What a rank holds of each parameter, whatever the ZeRO stage: slices of weights and of their optimizer states.

DeepSpeed 0.19 keeps the weights that are trained, in fp32, with every parameter (stage 0), in one flat tensor per
parameter group (1 and 2), or in flat tensors of equal partitions of parameters (3). Frozen parameters are in the
model's own precision, whole on every rank but at stage 3, where each is in equal partitions by itself.
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
        source: tensor that the weights are in; of trained ones in fp32, and the key of their optimizer states.
        offset: of the first element in the flattened `source`.
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
        """The slice's elements of a tensor shaped as `source`; a view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


class ModelSlices:
    """A rank's share of an engine's weights and optimizer states.

    Attributes:
        shapes: of all parameters, by name.
        frozen: names of the parameters that are not trained.
        held: what this rank has.
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
        """What this rank saves, by its name in the file: together all ranks' are everything once."""
        tensors = {}
        for held in self.held:
            share = own_share(held) if held.replicated else held
            if share.numel > 0:
                for kind in (WEIGHT,) if share.frozen else (WEIGHT, *self._states):
                    tensors[f"{kind}/{share.name}@{share.start}"] = self._values(share, kind)
        return tensors

    def to_read(self, states: Sequence[str]) -> Iterator[tuple[ParameterSlice, str, Tensor]]:
        """Slices to be filled, the kind of each (`WEIGHT` or the name of a state), and its elements, a view."""
        for held in self.held:
            for kind in (WEIGHT,) if held.frozen else (WEIGHT, *states):
                yield held, kind, self._values(held, kind)

    def _values(self, part: ParameterSlice, kind: str) -> Tensor:
        if kind == WEIGHT:
            return part.of(part.source)
        state = self._optimizer.state.get(part.source, {})
        if kind not in state:  # before the first step, or of a parameter that never had a gradient
            return torch.zeros(1, dtype=self._states[kind]).expand(part.numel)
        return part.of(state[kind])

    @property
    def optimizer_states(self) -> list[str]:
        """Names that the optimizer gives the tensors that it keeps with each parameter; none before its first step."""
        return list(self._states) if any(self._optimizer.state.values()) else []

    @property
    def optimizer_scalars(self) -> dict[str, float]:
        """Numbers that the optimizer keeps with each parameter, such as its steps; where they differ, the largest."""
        scalars: dict[str, float] = {}
        for state in self._optimizer.state.values():
            for name in state.keys() - self._states.keys():
                scalars[name] = max(float(state[name]), scalars.get(name, -torch.inf))
        return scalars

    @cached_property
    def _states(self) -> Mapping[str, torch.dtype]:
        """Of the tensors that the optimizer keeps with each parameter, or will from its first step on."""
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
        """State of the optimizer after its first step, taken with a parameter that is not the model's."""
        groups = self._optimizer.param_groups
        probe = nn.Parameter(torch.zeros(2, device=self.held[0].source.device))
        probe.grad = torch.zeros_like(probe)
        self._optimizer.param_groups = [{**groups[0], "params": [probe]}]
        self._optimizer.step()
        self._optimizer.param_groups = groups
        return probe, self._optimizer.state.pop(probe, {})

    def begin_load(self, states: Sequence[str], scalars: Mapping[str, float]) -> None:
        """Makes room for what is to be loaded; nothing where the optimizer had taken no step.

        Each tensor of weights gets scalars of its own: a step count that several share would advance several times a
        step.
        """
        if self._stage == 3:
            self._zero.checkpoint_event_prologue()
        if not states and not scalars:
            return
        for source in {id(held.source): held.source for held in self.held if not held.frozen}.values():
            numbers = {
                name: torch.tensor(value, dtype=torch.float32, device=source.device) for name, value in scalars.items()
            }
            self._optimizer.state[source] = numbers | {name: torch.zeros_like(source.detach()) for name in states}

    def end_load(self) -> None:
        """Carries loaded weights over to the model in its own precision; on all ranks."""
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
    """Of a parameter that every rank holds, what this one saves."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    low, high = whole.numel * rank // world_size, whole.numel * (rank + 1) // world_size
    return ParameterSlice(whole.name, low, high - low, whole.source, low, whole.frozen)
