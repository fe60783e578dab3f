"""The list of all metrics, from which the exporter and docs/metrics.md are made and dashboards and rules checked.

Names have base units and `_total` where they count. Prometheus adds the labels of the target: `job`, `run`, `node`.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from mixmae.base.phases import PHASES

PREFIX = "mixmae_"


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Source(StrEnum):
    """Which process exports a metric, and so how many series there are."""

    RANK = "rank"
    """Every rank its own: labelled by rank."""
    MAIN = "main"
    """The main rank, for the whole run: one series."""
    NODE = "node"
    """The exporter of each node."""


class Metric(NamedTuple):
    name: str
    """Without `mixmae_`."""
    kind: Kind
    source: Source
    help: str
    labels: tuple[str, ...] = ()
    """Beside `rank`, which every metric of a rank has."""
    unit: str = ""
    states: tuple[str, ...] = ()
    """A state set: values of its one label, 1 for the present one and 0 for the others."""

    @property
    def full_name(self) -> str:
        """As Prometheus shows it; a histogram's series add _bucket, _sum and _count."""
        return PREFIX + self.name

    @property
    def label_names(self) -> tuple[str, ...]:
        return ("rank", *self.labels) if self.source is Source.RANK else self.labels


STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Seconds. Powers of ten in thirds: any step time falls into a bucket at most 2.5 times as wide as its lower end."""
RESULTS = ("found", "fetched")
"""A block is found in the node's cache, or fetched over the network."""
ENDS = ("preempted", "failed", "killed", "finished")
"""How an attempt at a run can end; one without a record of its end was killed."""

_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
_R, _M, _N = Source.RANK, Source.MAIN, Source.NODE

METRICS = (
    # progress
    Metric("optimizer_steps_total", _C, _R, "Optimizer steps finished since this process started"),
    Metric("images_total", _C, _R, "Images that this rank trained on since its process started"),
    Metric("heartbeat_timestamp_seconds", _G, _R, "When this rank last finished a step", unit="seconds"),
    Metric("step", _G, _R, "Optimizer step of the run that this rank finished last"),
    Metric("alive_timestamp_seconds", _G, _R, "When this rank's process last ran, whatever it waits for",
           unit="seconds"),
    Metric("rank_part", _G, _R, "Phase that this rank is in: 1 for that one, 0 for the others", ("part",),
           states=PHASES),
    Metric("parts_total", _C, _R, "Phases of steps that this rank began since its process started; all ranks begin"
           " the same ones"),
    Metric("world_size", _G, _M, "Ranks of the run"),
    Metric("target_steps", _G, _M, "Optimizer steps of the whole run"),
    Metric("epoch", _G, _M, "Epochs of data seen, with the position in the present one as a fraction"),
    Metric("start_timestamp_seconds", _G, _M, "When this process of the main rank started to train", unit="seconds"),
    Metric("estimated_end_timestamp_seconds", _G, _M, "When the run ends at its present rate", unit="seconds"),
    Metric("run_info", _G, _M, "Always 1; what runs",
           ("recipe", "encoder", "parameters", "world_size", "zero_stage", "precision", "torch", "deepspeed",
            "version")),
    Metric("resumes_total", _C, _M, "Times that the run was started again, by how the attempt before ended",
           ("reason",)),
    # speed
    Metric("step_seconds", _H, _R, "Time from the end of one step to the end of the next", unit="seconds"),
    Metric("step_part_seconds", _H, _R, "Time of the phases of a step", ("part",), "seconds"),
    Metric("images_per_second", _G, _M, "Images of the whole run per second since the last logged step"),
    Metric("model_flops_per_second", _G, _M, "Operations of the model per second, without recomputation"),
    Metric("mfu_ratio", _G, _M, "Share of the devices' peak that the model's operations reach", unit="ratio"),
    Metric("communication_bytes_total", _C, _R, "Bytes handed to collective operations", ("operation",), "bytes"),
    Metric("communication_seconds_total", _C, _R, "Time that collective operations took", ("operation",), "seconds"),
    # learning
    Metric("loss", _G, _M, "Mean loss over all ranks since the last logged step"),
    Metric("gradient_norm", _G, _M, "Norm of the gradient before clipping, at the last logged step"),
    Metric("learning_rate", _G, _M, "Learning rate of the last logged step"),
    Metric("weight_decay", _G, _M, "Weight decay of the parameters that have one"),
    Metric("evaluation", _G, _M, "What the task measured at its last evaluation", ("metric",)),
    Metric("evaluations_below_highest", _G, _M, "Evaluations in a row in which a figure was more than a tenth below its"
           " highest of the run", ("metric",)),
    Metric("skipped_steps_total", _C, _M, "Steps that this process skipped because a loss or gradient was not finite"),
    # memory
    Metric("device_memory_allocated_bytes", _G, _R, "Memory of the device in use", unit="bytes"),
    Metric("device_memory_reserved_bytes", _G, _R, "Memory of the device held by the allocator", unit="bytes"),
    Metric("device_memory_peak_bytes", _G, _R, "Most memory of the device ever in use", unit="bytes"),
    Metric("device_memory_limit_bytes", _G, _R, "Memory of the device", unit="bytes"),
    Metric("resident_memory_bytes", _G, _R, "Host memory of this rank's process", unit="bytes"),
    Metric("open_files", _G, _R, "Open file descriptors of this rank's process"),
    # data
    Metric("read_bytes_total", _C, _R, "Bytes of images read from shards", unit="bytes"),
    Metric("read_retries_total", _C, _R, "Reads that were tried again"),
    Metric("replaced_samples_total", _C, _R, "Samples that could not be used, by reason", ("reason",)),
    Metric("cache_blocks_total", _C, _R, "Blocks of remote shards that were wanted: found in the node's cache, or"
           " fetched", ("result",)),
    Metric("data_queue_batches", _G, _R, "Micro-batches that are ready and not yet taken"),
    # checkpoints
    Metric("checkpoint_seconds", _H, _M, "Time that the step waits for a checkpoint", unit="seconds"),
    Metric("checkpoint_write_seconds", _H, _M, "Time from the start of a save until it is complete", unit="seconds"),
    Metric("checkpoint_bytes", _G, _M, "Size of the newest checkpoint", unit="bytes"),
    Metric("checkpoint_timestamp_seconds", _G, _M, "When the newest complete checkpoint was saved", unit="seconds"),
    Metric("checkpoint_failures_total", _C, _M, "Checkpoints that could not be saved"),
    # nodes
    Metric("node_memory_available_bytes", _G, _N, "Host memory that is available", unit="bytes"),
    Metric("node_memory_total_bytes", _G, _N, "Host memory", unit="bytes"),
    Metric("run_dir_free_bytes", _G, _N, "Free space where the run directory is", unit="bytes"),
    Metric("run_dir_size_bytes", _G, _N, "Size of the file system of the run directory", unit="bytes"),
    Metric("shm_free_bytes", _G, _N, "Free shared memory, through which data workers pass batches", unit="bytes"),
    Metric("gpu_utilization_ratio", _G, _N, "Share of time in which the GPU computed", ("gpu",), "ratio"),
    Metric("gpu_power_watts", _G, _N, "Power that the GPU draws", ("gpu",), "watts"),
    Metric("gpu_temperature_celsius", _G, _N, "Temperature of the GPU", ("gpu",), "celsius"),
    Metric("scrapes_total", _C, _N, "Scrapes that this node's exporter answered"),
)  # fmt: skip

BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}
