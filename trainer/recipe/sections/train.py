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


class Train(Section):
    duration: Duration = Span(600, "epoch")
    global_batch: Batch = 1024
    micro_batch: Batch = 128
    precision: Literal["bf16", "fp32"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    compile: bool = False
    """Compiles each block and the loss (torch.compile)."""
    fused_attention: bool = False
    """On GPUs: the global stages' attention in one kernel (models/ops) in place of torch's."""
    max_skipped_steps: int = Field(10, ge=1)
    """So many steps in a row with a non-finite loss or gradient end the run."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError(
                "zero_stage=0 with precision=bf16 starts DeepSpeed's optimizer with a step on empty "
                "gradients; use zero_stage=1, which also saves memory, or precision=fp32"
            )
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile=true gains nothing with zero_stage=3, whose hooks break every graph; use "
                "zero_stage=2 or compile=false"
            )
        if self.compile and self.activation_checkpointing.kind == "fairscale":
            raise ValueError(
                "compile=true with activation_checkpointing.kind=fairscale recomputes other random masks "
                "than it used; use kind=torch or compile=false"
            )
        return self
