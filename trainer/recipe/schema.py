"""The recipe's schema, with every default; `loading` reads recipes. No torch: login nodes read them too."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mixmae.base.errors import UsageError
from mixmae.base.liveness import JOIN_SECONDS, STALL_SECONDS, STUCK_SECONDS
from mixmae.base.redaction import redact_all
from mixmae.trainer.recipe.units import Duration, Size, Span

_VARIABLE = re.compile(r"\$(?:\{(\w*)\}|(\w+))")


def expand(path: str) -> str:
    """A path with `~`, `~user`, `$NAME` and `${NAME}` as a shell would have them.

    Raises:
        ValueError: there is no such variable or user.
    """
    for braced, bare in _VARIABLE.findall(path):
        if (name := braced or bare) not in os.environ:
            raise ValueError(f"the environment has no variable {name}; set it, or write the path out")
    expanded = os.path.expandvars(path)
    if not expanded.startswith("~"):
        return expanded
    try:
        return str(Path(expanded).expanduser())
    except RuntimeError as error:
        raise ValueError(f"{expanded.partition('/')[0]} is nobody's home; write the path out, or ./{path}") from error


def is_elsewhere(shards: str) -> bool:
    """Whether shards are behind a URL or a command, and not in a directory."""
    return "://" in shards or shards.startswith("pipe:")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    @field_validator("*", mode="after")
    @classmethod
    def _paths_are_expanded(cls, value: Any) -> Any:
        return Path(expand(str(value))) if isinstance(value, Path) else value


_STREAMS = 512
"""The most that a recipe which does not say how many gets."""
_SHOWN = 20
"""World sizes that a message proposes."""
Share = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(gt=0)]
Batch = Annotated[int, Field(gt=0, le=2**24)]
Seconds = Annotated[float, Field(gt=0, le=1e7)]
"""Of patience: at most some months, which every library's timeouts can hold."""


class Component(Section):
    """A part of the model by its registered name; it has keys of its own, which it checks itself (`components`)."""

    model_config = ConfigDict(extra="allow")
    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """The component's own keys."""
        return dict(self.model_extra or {})


class EncoderSection(Component):
    """The encoder, with the sizes that shall differ from those of its name."""

    name: str = "mixmae_swin_base_w14"
    img_size: int = Field(224, gt=0, le=4096)
    init: Path | None = None
    """Encoder directory (`mixmae import`, `mixmae export`) or run directory to start from; None starts from random
    weights."""


class MethodSection(Component):
    """How the encoder is pretrained."""

    name: str = "mixmae"


class Probe(Section):
    """How well frozen features of unmixed images tell classes apart, measured while the encoder is pretrained."""

    shards: str
    """A directory or URL. With labels: accuracy of k nearest neighbours and of a linear classifier, on a half of the
    images after learning from the other. Without any: effective rank and mean cosine, which show collapse, alone."""
    every: Duration = Span(10, "epoch")


class Classification(Section):
    """Classes, where images have labels."""

    num_classes: int | None = Field(None, gt=1)
    """None: as many as `data.shards` has."""
    classes: tuple[str, ...] | None = None
    """Their names, in the order of their numbers; None: those of `data.shards`, () where they have numbers alone."""
    multi_label: bool = False
    """Whether an image has any number of classes: its label is a list of names, separated by commas."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)


class Linear(Section):
    """Linear probes of one frozen encoder, all trained in one pass: a classifier for each pair of the two lists."""

    lr_scales: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.1, 0.3, 1.0, 3.0, 10.0), min_length=1)
    """Learning rates over the schedule's."""
    stages: tuple[Annotated[int, Field(gt=0)], ...] = Field((1, 2), min_length=1)
    """So many of the encoder's last stages are pooled, and their features put side by side."""
    cache_features: bool = False
    """Centre crops in place of random ones: the features of all images are computed once, and kept in run_dir."""


class Augment(Section):
    """What is done to images with labels, beside crop and flip."""

    rand_augment: str | None = None
    """RandAugment as timm writes it, such as rand-m9-mstd0.5-inc1."""
    random_erasing: Fraction = 0.0
    """Probability that a box of an image becomes noise."""
    mixup: float = Field(0.0, ge=0)
    """Alpha of mixup; 0 for none."""
    cutmix: float = Field(0.0, ge=0)
    """Alpha of CutMix; 0 for none."""
    mix_prob: Fraction = 1.0
    """Probability that a micro-batch is mixed."""
    switch_prob: Fraction = 0.5
    """Probability of CutMix where both are on."""


class Evaluate(Section):
    """What is measured while the run goes on; its figures become curves, gauges and criteria for `keep_best`."""

    every: Duration = Span(5, "epoch")
    shards: str | None = None
    """Held-out shards for the task's evaluation, a directory or URL; None evaluates nothing. The ranks themselves read
    the images, between two steps: some thousands of them will do."""
    probe: Probe | None = None
    """What is probed while an encoder is pretrained; some thousands of images will do here too."""
    crop_ratio: float | None = Field(None, gt=0, le=1)
    """Side of the centre crop over the image's shorter side; None: 0.875 (256 to 224 px) up to 224 px, 1 above."""

    @field_validator("shards", mode="after")
    @classmethod
    def _directories_are_expanded(cls, shards: str | None) -> str | None:
        return shards if shards is None or is_elsewhere(shards) else expand(shards)


class Network(Section):
    """How shards behind a URL are read."""

    timeout: Seconds = 30.0
    """Seconds without an answer after which a read is given up and tried again."""
    retries: int = Field(5, ge=0, le=100)
    """Further tries of a failed read, 0.5, 1, 2, ... seconds apart."""
    allow_shell: bool = False
    """Whether `pipe:COMMAND` may be a shard directory: its command runs in a shell on every node."""


class Cache(Section):
    """Where blocks of shards behind a URL are kept on this node."""

    dir: Path | None = None
    """Shared by the ranks of a node, and kept. None: a temporary folder of each rank, gone when the run ends."""
    max_bytes: Size = 20 * 10**9


class Data(Section):
    shards: str = "shards"
    """A directory, or the URL of one: http(s)://, s3://, or anything that fsspec opens."""
    num_workers: int = Field(4, ge=0, le=1024)
    prefetch_factor: int = Field(4, ge=1, le=1024)
    decoder: Literal["fast", "pillow"] = "fast"
    """`fast` decodes no more of a JPEG than the crop needs; `pillow` is the plain reference."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    hflip: float = Field(0.5, ge=0, le=1)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Deviation, Deviation, Deviation] = (0.229, 0.224, 0.225)
    streams: int | None = Field(None, gt=0)
    """Canonical streams, a whole number for each rank; None: up to 512 that divide global_batch."""
    shuffle_window: int = Field(64, gt=0, le=2**24)
    """Samples of a stream that are shuffled among each other; also what a resume reads again at most."""
    drop_last: bool = False
    """Drops the samples that do not fill an epoch's last global batch; else they open the next epoch."""
    max_corrupt_fraction: float = Field(0.01, ge=0, lt=1)
    """Unusable samples that a rank steps over in an epoch, as a share of its samples; more end the run."""
    max_pixels: int = Field(178_956_970, gt=0, le=178_956_970)
    """Larger images are unusable: a worker decodes one in 4 bytes a pixel, and more while it does."""
    network: Network = Network()
    cache: Cache = Cache()

    @property
    def directory(self) -> Path | None:
        """The shards' directory; None if they are behind a URL or a command."""
        return None if is_elsewhere(self.shards) else Path(self.shards)

    @field_validator("shards", mode="after")
    @classmethod
    def _directories_are_expanded(cls, shards: str) -> str:
        return shards if is_elsewhere(shards) else expand(shards)

    @model_validator(mode="after")
    def _crops_are_shares_of_the_image(self) -> Self:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale={[low, high]}: expected shares of the image's area, 0 < low <= high <= 1")
        return self


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


class Optim(Section):
    base_lr: float = Field(1.5e-4, gt=0)
    """Learning rate at a global batch of 256; the run's is base_lr * global_batch / 256."""
    min_lr: float = Field(0.0, ge=0)
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    no_decay: tuple[str, ...] | None = None
    """Parts of names exempt from weight decay, beside all 1-D parameters; None exempts what the model names (bias
    tables, mask tokens), () decays that too, as the release does."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay in each step of a moving average of the fp32 weights, which is then evaluated and exported; None: none."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each layer's learning rate over that of the layer above it, where an encoder is fine-tuned."""
    layer_decay_rule: Literal["standard", "mixmim", "simmim"] = "standard"
    """Which layer is which: `standard` gives final norm and head the full rate, as BEiT; `mixmim` (the release) that of
    a layer below; `simmim` as standard, with patch merging of the layer before it, not behind."""
    warmup: Duration = Span(40, "epoch")
    clip_grad: float | None = Field(None, gt=0)


class Checkpoint(Section):
    every: Duration = Span(1, "epoch")
    keep: int = Field(3, ge=1)
    """The last so many are kept."""
    keep_every: Duration | None = None
    """The first one after each such stretch is kept too."""
    keep_best: int = Field(0, ge=0)
    """So many with the best value of `best_metric` are kept too."""
    best_metric: str = "loss"
    """The logged loss, or a figure of the task's evaluation, such as val_loss."""
    best_mode: Literal["min", "max"] = "min"
    asynchronous: bool = True
    """Writes while training goes on, from a copy in host memory: 12 bytes per parameter, shared by the ranks, held from
    the start on. Else training stands until all is written, and no memory is taken."""
    max_failures: int = Field(3, ge=0)
    """Saves in a row that may fail (a full disk) before the run ends."""
    stop_before_end: float = Field(300.0, ge=0, le=1e7)
    """Seconds before the end of a Slurm job's time at which the run saves and stops."""


class WeightsAndBiases(Section):
    """A run on Weights & Biases. The environment says whether it is online (WANDB_MODE), and who one is."""

    project: str = "mixmae"
    group: str | None = None
    entity: str | None = None


class Log(Section):
    every: int = Field(50, ge=1)
    """Optimizer steps between two logged ones."""
    pictures: Duration | None = Span(5, "epoch")
    """Between two pictures of reconstructions; null for none."""
    samples: bool = False
    """Writes which samples each step used, one file a rank; for audits of what a model has seen."""
    wandb: WeightsAndBiases | None = None
    """Beside the run's own record; needs the extra `wandb`."""


class Monitoring(Section):
    enabled: bool = True
    address: str = "127.0.0.1"
    """On which each node's exporter listens; 0.0.0.0 for a Prometheus on another host."""
    port: int = Field(9400, ge=0, le=65535)
    """The first of 100 that are tried."""
    certfile: Path | None = None
    keyfile: Path | None = None
    auth_file: Path | None = None
    """A file with one line, user:password; None lets everybody read."""
    stall_seconds: Seconds = STALL_SECONDS
    """/healthz fails when a rank of the node finished no step for so long."""
    pushgateway: str | None = None
    """URL to which each node pushes its last numbers at the end; for runs that end between two scrapes."""
    comms_logger: bool = False
    """Counts communication by operation; DeepSpeed then waits for each operation, which costs speed."""
    peak_flops: float | None = Field(None, gt=0)
    """Operations per second that a device can do, for the MFU; None: known ones are looked up."""

    @model_validator(mode="after")
    def _a_key_needs_its_certificate(self) -> Self:
        if self.keyfile is not None and self.certfile is None:
            raise ValueError(f"keyfile={self.keyfile} without certfile; set both for TLS")
        return self


class Launch(Section):
    """How `mixmae launch` starts ranks, and when it gives a run up."""

    tasks: Literal["per_gpu", "per_node"] = "per_gpu"
    """Under Slurm: one task per rank, or one per node that starts its ranks by DeepSpeed's launcher."""
    port: int | None = Field(None, ge=1024, le=64_000)
    """The first of the few that ranks meet on, on rank 0's host; None: from 20000 to 31000, others for each start."""
    join_seconds: Seconds = JOIN_SECONDS
    """A run whose ranks are not all there by then is ended."""
    stuck_seconds: Seconds = STUCK_SECONDS
    """A run in which no rank moved for so long is ended, naming the late one; thrice that while starting or saving."""
    grace_seconds: Seconds = 120.0
    """From the signal to stop to the end of all ranks: the time to save in; Slurm warns so long before the limit."""


class Recipe(Section):
    run_dir: Path = Path("runs/mixmae")
    seed: int = Field(0, ge=0, lt=2**63)
    task: str = "pretrain"
    plugins: tuple[str, ...] = ()
    """Modules that register tasks, methods and encoders of your own; imported before the recipe is checked."""
    encoder: EncoderSection = EncoderSection()
    method: MethodSection = MethodSection()
    classification: Classification = Classification()
    linear: Linear = Linear()
    data: Data = Data()
    augment: Augment = Augment()
    train: Train = Train()
    optim: Optim = Optim()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    monitoring: Monitoring = Monitoring()
    launch: Launch = Launch()

    @model_validator(mode="after")
    def _streams_share_the_global_batch(self) -> Self:
        if self.train.global_batch % self.streams:
            raise ValueError(
                f"train.global_batch={self.train.global_batch} does not divide by data.streams={self.streams}: each "
                "batch takes the same number of samples from each stream"
            )
        return self

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per optimizer step and rank.

        Raises:
            UsageError: the global batch does not divide by micro_batch * world_size.
        """
        at_once = self.train.micro_batch * world_size
        if self.train.global_batch % at_once:
            largest = min(self.train.micro_batch, self.train.global_batch // world_size)
            fits = (m for m in range(largest, 0, -1) if self.train.global_batch % (m * world_size) == 0)
            fit = next(fits, None)
            change = f"train.micro_batch={fit} would" if fit else f"train.global_batch={at_once} would"
            raise UsageError(
                f"train.global_batch={self.train.global_batch} does not divide by train.micro_batch="
                f"{self.train.micro_batch} on {world_size} ranks; {change}"
            )
        return self.train.global_batch // at_once

    @property
    def batch_bytes_ahead(self) -> int:
        """Bytes of shared memory for the images that a rank's data workers hold ready."""
        image = 3 * self.encoder.img_size**2
        return self.data.num_workers * self.data.prefetch_factor * self.train.micro_batch * image

    @property
    def streams(self) -> int:
        """Canonical streams of the data's order."""
        if self.data.streams is not None:
            return self.data.streams
        divisors = [n for n in range(1, _STREAMS + 1) if self.train.global_batch % n == 0]
        return max(divisors, key=lambda n: (n & -n, n))  # clusters come in powers of two

    def streams_of(self, rank: int, world_size: int) -> range:
        """The streams that a rank serves.

        Raises:
            UsageError: the streams cannot be split evenly among so many ranks.
        """
        if self.streams % world_size:
            allowed = [str(n) for n in range(1, self.streams + 1) if self.streams % n == 0][:_SHOWN]
            fits = next(n for n in range(world_size, 0, -1) if self.streams % n == 0)
            raise UsageError(
                f"{world_size} ranks cannot share data.streams={self.streams} in whole numbers; use "
                f"{', '.join(allowed)} ranks "
                f"({fits} is the nearest below), or, in a new run, data.streams set to a multiple of {world_size} that "
                f"divides train.global_batch={self.train.global_batch}"
            )
        share = self.streams // world_size
        return range(rank * share, (rank + 1) * share)

    def to_yaml(self) -> str:
        """All of it, as ranks read it; credentials in URLs included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def shown(self) -> dict[str, Any]:
        """Nested values without credentials, for records that others may read."""
        values: dict[str, Any] = redact_all(self.model_dump(mode="json"))
        return values
