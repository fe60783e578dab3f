"""`train:`: how long, in which batches and precision, and what saves memory or time."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mixmae.trainer.recipe.sections.section import Batch, Section
from mixmae.trainer.recipe.units import Duration, Span


class ActivationCheckpointing(Section):
    kind: Literal["none", "selective", "torch", "fairscale"] = "none"
    stages: tuple[str, ...] | None = None
    """Of the model's groups of blocks: 1, 2, ... for the encoder's stages, and the method's own, such as decoder."""
    cpu_offload: bool = False

    @field_validator("stages", mode="before")
    @classmethod
    def _numbers_are_names(cls, stages: Any) -> Any:
        return [str(stage) for stage in stages] if isinstance(stages, list | tuple) else stages

    @model_validator(mode="after")
    def _offload_needs_fairscale(self) -> Self:
        if self.cpu_offload and self.kind != "fairscale":
            raise ValueError(f"cpu_offload works with kind=fairscale only, not {self.kind}")
        return self


_Switch = Literal["auto", True, False]
"""auto: what is faster on the hardware that the run is started on (`recipe.hardware`)."""


class Train(Section):
    duration: Duration = Span(600, "epoch")
    global_batch: Batch = 1024
    micro_batch: Batch = 128
    precision: Literal["bf16", "fp32"] = "bf16"
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """auto: 2 where several ranks have GPUs, else 1."""
    overlap_comm: _Switch = "auto"
    """Gradients are reduced beside the backward pass (ZeRO 2 and 3); auto: where several ranks have GPUs."""
    communication_dtype: Literal["bf16", "fp32"] = "bf16"
    """In which gradients of a bf16 model are summed over ranks; fp32 sends twice the bytes (docs/performance.md)."""
    deterministic: bool = False
    """On GPUs: the same numbers in each run of as many ranks on the same hardware, bit for bit; slower."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    compile: _Switch = "auto"
    """Compiles each block and the loss (torch.compile); auto: on GPUs, where images have one size and
    neither ZeRO 3 nor fairscale is asked for."""
    fused_attention: _Switch = "auto"
    """On GPUs, where auto means true in bf16: attention in kernels of this project's own (models/ops) where they apply,
    else torch's, which a warning says."""
    max_skipped_steps: int = Field(10, ge=1)
    """So many steps in a row with a non-finite loss or gradient end the run."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError(
                "zero_stage=0 with precision=bf16 starts DeepSpeed's optimizer with a step on empty "
                "gradients; use zero_stage=1, which also saves memory, or precision=fp32"
            )
        if self.compile is True and self.zero_stage == 3:
            raise ValueError(
                "compile=true gains nothing with zero_stage=3, whose hooks break every graph; use "
                "zero_stage=2 or compile=false"
            )
        if self.overlap_comm is True and self.zero_stage in (0, 1):
            raise ValueError(
                f"overlap_comm=true with zero_stage={self.zero_stage}, which reduces gradients after the backward "
                "pass; use zero_stage=2 or overlap_comm=auto"
            )
        if self.compile is True and self.activation_checkpointing.kind == "fairscale":
            raise ValueError(
                "compile=true with activation_checkpointing.kind=fairscale recomputes other random masks "
                "than it used; use kind=torch or compile=false"
            )
        return self

    @property
    def stage(self) -> int:
        """The ZeRO stage, once the recipe is fitted to its hardware."""
        assert self.zero_stage != "auto", "see recipe.hardware.fit_hardware"
        return self.zero_stage
