"""What a rank holds of each parameter, whatever the ZeRO stage: stretches of fp32 weights and of AdamW's moments.

The three kinds of places where DeepSpeed 0.19 keeps them: with every parameter (stage 0), in one flat tensor per
parameter group (1 and 2), in flat tensors of equal parts of parameters (3).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of a flattened parameter.

    Attributes:
        home: fp32 tensor that the weights are in, the key of their optimizer state.
        offset: of the first element in the flattened `home`.
    """

    name: str
    start: int
    numel: int
    home: Tensor
    offset: int


class Pieces:
    """A rank's share of an engine's weights and optimizer state."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        self._inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self._stage: int = engine.zero_optimization_stage()
        parameters = dict(engine.module.named_parameters())
        assert all(parameter.requires_grad for parameter in parameters.values()), "frozen parameters are not saved"
        self.shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
        self.held = list(self._find(parameters))

    def _find(self, parameters: dict[str, nn.Parameter]) -> Iterator[Piece]:
        for name, parameter in parameters.items():
            if self._stage == 0:
                yield Piece(name, 0, parameter.numel(), parameter, 0)
            elif self._stage == 3:
                yield from self._equal_part(name, parameter)
            else:
                yield from self._flat_stretch(name, parameter)

    def _flat_stretch(self, name: str, parameter: Any) -> Iterator[Piece]:
        mapping = parameter._hp_mapping
        if mapping is not None:
            home = self._inner.param_groups[mapping.param_group_index]["params"][0]
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Piece(name, here.start, here.numel, home, there.start)

    def _equal_part(self, name: str, parameter: Any) -> Iterator[Piece]:
        group, offset, padded = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        start = dist.get_rank() * padded
        numel = min(padded, parameter.ds_numel - start)
        if numel > 0:
            yield Piece(name, start, numel, self._optimizer.fp32_partitioned_groups_flat[group], offset)

    def to_write(self) -> list[Piece]:
        """The pieces that this rank saves: together all ranks' are every parameter once."""
        if self._stage > 0:
            return self.held
        rank, world_size = dist.get_rank(), dist.get_world_size()
        cuts = [(p, p.numel * rank // world_size, p.numel * (rank + 1) // world_size) for p in self.held]
        return [Piece(p.name, low, high - low, p.home, low) for p, low, high in cuts if high > low]

    def values(self, piece: Piece, kind: str) -> Tensor:
        """fp32 [numel], a view where there is one; moments are zeros before the optimizer's first step."""
        if kind == "weight":
            home = piece.home
        else:
            state = self._inner.state.get(piece.home, {})
            if kind not in state:
                return torch.zeros(1).expand(piece.numel)
            home = state[kind]
        return home.detach().view(-1)[piece.offset : piece.offset + piece.numel]

    @property
    def optimizer_step(self) -> int:
        """Steps that the optimizer took."""
        return max((int(state["step"]) for state in self._inner.state.values() if state), default=0)

    def begin(self, optimizer_step: int) -> None:
        """Makes room for what is to be loaded.

        Each tensor of weights gets a step count of its own: one that several share would advance several times a step.
        """
        if self._stage == 3:
            self._optimizer.checkpoint_event_prologue()
        if optimizer_step == 0:
            return
        for home in {id(piece.home): piece.home for piece in self.held}.values():
            step = torch.tensor(float(optimizer_step), dtype=torch.float32, device=home.device)
            self._inner.state[home] = {"step": step, **{kind: torch.zeros_like(home.detach()) for kind in MOMENTS}}

    def settle(self) -> None:
        """Carries loaded weights over to the model in its own precision; on all ranks."""
        if self._stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self._stage == 3:
            self._settle_parts()
            self._optimizer.checkpoint_event_epilogue()

    def _settle_parts(self) -> None:
        optimizer = self._optimizer
        for weights, flat in zip(
            optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True
        ):
            flat.data.copy_(weights.data)
        for flat, parts in zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp16_partitioned_groups, strict=True):
            for part, value in zip(parts, optimizer.unflatten(flat, parts), strict=True):
                part.data = value.data
