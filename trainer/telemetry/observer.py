"""Records a rank's metrics for its node's exporter, in shared memory, and its heartbeat for the launcher."""

import math
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch

from mixmae.base.heartbeat import Heartbeat
from mixmae.base.phases import PHASES, STEP_PHASES
from mixmae.base.run_directory import newest_checkpoint
from mixmae.base.software import versions
from mixmae.monitoring.exporter.discovery import remove_targets, run_label
from mixmae.monitoring.exporter.node import SHARED_MEMORY
from mixmae.monitoring.exporter.recorder import NullRecorder, Recorder
from mixmae.monitoring.metrics import ENDS
from mixmae.trainer.checkpoints.saver import Saved
from mixmae.trainer.data.stream import Stream
from mixmae.trainer.engine.distributed import Ranks, from_main
from mixmae.trainer.recipe.resume_rules import recipe_id
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run.state import TrainState
from mixmae.trainer.tasks.flops import model_flops, peak_flops
from mixmae.trainer.telemetry.clock import StepClock
from mixmae.trainer.telemetry.comms import Communication
from mixmae.trainer.telemetry.events import read_events
from mixmae.trainer.telemetry.exporter_process import ExporterProcess
from mixmae.trainer.telemetry.falling import FallingFigures

_NUMBERS = {phase: number for number, phase in enumerate(PHASES)}


class Observer:
    """A rank's side of monitoring. Nothing here waits: not for the device, a reader, or the exporter."""

    def __init__(
        self,
        recorder: Recorder | NullRecorder,
        recipe: Recipe,
        ranks: Ranks,
        shared: Path | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.recorder, self.recipe, self.ranks, self.shared = recorder, recipe, ranks, shared
        self.heartbeat = heartbeat or Heartbeat()
        self._ends_heartbeat = heartbeat is None
        self.exporter: ExporterProcess | None = None
        """Of the node's first rank."""
        self.clock = StepClock(
            ranks.device,
            on_phase_end=lambda phase, seconds: recorder.observe("step_part_seconds", seconds, phase),
            on_step_end=lambda seconds: recorder.observe("step_seconds", seconds),
            on_phase=self.set_phase,
        )
        self._process = psutil.Process()
        self._communication = Communication()
        self._falling = FallingFigures()
        self._flops = 0.0
        self._peak: float | None = None
        recorder.add("parts_total", 0)
        self.set_phase("starting")
        if ranks.is_main:
            recorder.set("world_size", ranks.world_size)
        self.heartbeat.add_listener(self._tick)

    def export(self, run: str) -> None:
        """Starts the node's exporter, which calls the run so; for the node's first rank."""
        assert self.shared is not None
        self.exporter = ExporterProcess(self.recipe, self.shared, run=run)

    def set_phase(self, phase: str) -> None:
        """The rank comes to one of `PHASES`."""
        self.recorder.set("rank_part", _NUMBERS[phase])
        if phase in STEP_PHASES:
            self.recorder.add("parts_total", 1)
        self.heartbeat.set_phase(phase)

    def _tick(self) -> None:
        self.recorder.set("alive_timestamp_seconds", time.time())

    def restarted(self, past_ends: Sequence[str]) -> None:
        """Counts how earlier attempts at the run ended; the main rank knows."""
        if self.ranks.is_main:
            ends = Counter(past_ends)
            for reason in ENDS:
                self.recorder.set("resumes_total", ends[reason], reason)

    def begin(self, total_steps: int, parameters: int, step: int = 0) -> None:
        """Records what runs, from which step on; for the main rank."""
        past = [event["metrics"] for event in read_events(self.recipe.run_dir, "evaluation") if event["step"] <= step]
        self._falling = FallingFigures(past)
        self._flops = model_flops(self.recipe)
        self._peak = peak_flops(self.recipe, self.ranks.device)
        train, found = self.recipe.train, versions()
        self.recorder.set(
            "run_info",
            1,
            recipe_id(self.recipe),
            self.recipe.encoder.name,
            f"{parameters / 1e6:.1f}M",
            str(self.ranks.world_size),
            str(train.stage),
            train.precision,
            found["torch"],
            found["deepspeed"],
            found["mixmae"],
        )
        self.recorder.set("start_timestamp_seconds", time.time())
        self.recorder.set("target_steps", total_steps)
        self.recorder.set("weight_decay", self.recipe.optim.weight_decay)
        self.recorder.set("skipped_steps_total", 0)
        self.recorder.set("checkpoint_failures_total", 0)
        if (newest := newest_checkpoint(self.recipe.run_dir)) is not None:
            self.recorder.set("checkpoint_timestamp_seconds", newest.stat().st_mtime)

    def step(self, state: TrainState, images: int) -> None:
        """A step is finished."""
        self.clock.finish()
        self.recorder.add("optimizer_steps_total", 1)
        self.recorder.add("images_total", images)
        self.recorder.set("step", state.step)
        self.recorder.set("heartbeat_timestamp_seconds", time.time())
        self.heartbeat.set_phase("between", state.step)

    def data(self, stream: Stream) -> None:
        """Records bytes read, retries, queued batches, cache use and replaced samples."""
        self.recorder.set("read_bytes_total", stream.bytes_read)
        self.recorder.set("read_retries_total", stream.retried)
        self.recorder.set("data_queue_batches", stream.ready)
        for result, blocks in stream.cache_counts._asdict().items():
            self.recorder.set("cache_blocks_total", blocks, result)
        for reason, count in stream.fault_log.counts.items():
            self.recorder.set("replaced_samples_total", count, reason.label)

    def process(self) -> None:
        """Records this process's memory, open files and communication; at logged steps."""
        self.recorder.set("resident_memory_bytes", self._process.memory_info().rss)
        self.recorder.set("open_files", self._process.num_fds() if hasattr(self._process, "num_fds") else math.nan)
        if self.ranks.device.type == "cuda":
            device = self.ranks.device
            self.recorder.set("device_memory_allocated_bytes", torch.cuda.memory_allocated(device))
            self.recorder.set("device_memory_reserved_bytes", torch.cuda.memory_reserved(device))
            self.recorder.set("device_memory_peak_bytes", torch.cuda.max_memory_allocated(device))
            limit = torch.cuda.get_device_properties(device).total_memory
            self.recorder.set("device_memory_limit_bytes", limit)
        self._communication.read()
        for operation, count in self._communication.bytes.items():
            self.recorder.set("communication_bytes_total", count, operation)
            self.recorder.set("communication_seconds_total", self._communication.seconds[operation], operation)

    def logged(self, values: dict[str, float], state: TrainState, total_steps: int) -> None:
        """Records loss, learning rate, speed and the like of a logged step; for the main rank."""
        rate = values["images_per_second"]
        self.recorder.set("loss", values["loss"])
        self.recorder.set("gradient_norm", values["grad_norm"])
        self.recorder.set("learning_rate", values["lr"])
        self.recorder.set("epoch", values["epoch"])
        self.recorder.set("images_per_second", rate)
        self.recorder.set("model_flops_per_second", rate * self._flops)
        if self._peak is not None:
            self.recorder.set("mfu_ratio", rate * self._flops / (self._peak * self.ranks.world_size))
        if rate:
            left = (total_steps - state.step) * self.recipe.train.global_batch / rate
            self.recorder.set("estimated_end_timestamp_seconds", time.time() + left)

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Records what the task measured, but for single classes (`iou/wall`), of which there are hundreds; for the
        main rank."""
        metrics = {name: value for name, value in metrics.items() if "/" not in name}
        for name, value in metrics.items():
            self.recorder.set("evaluation", value, name)
        for name, count in self._falling.add(metrics).items():
            self.recorder.set("evaluations_below_highest", count, name)

    def skipped(self) -> None:
        """Counts a skipped step; for the main rank."""
        self.recorder.add("skipped_steps_total", 1)

    def checkpoint(self, saved: Saved) -> None:
        """Records a saved checkpoint; for the main rank."""
        self.recorder.observe("checkpoint_seconds", saved.stall)
        self.recorder.observe("checkpoint_write_seconds", saved.seconds)
        self.recorder.set("checkpoint_timestamp_seconds", time.time())
        self.recorder.set("checkpoint_bytes", saved.bytes)

    def checkpoint_failed(self) -> None:
        self.recorder.add("checkpoint_failures_total", 1)

    def close(self, clean: bool) -> None:
        """Ends the exporter; after an unclean end its target stays, and Prometheus sees a node that is down."""
        self.heartbeat.remove_listener(self._tick)
        if self._ends_heartbeat:
            self.heartbeat.close()
        self.recorder.close()
        if self.exporter is not None:
            self.exporter.close(clean)
        if self.shared is not None and self.ranks.local_rank == 0:
            shutil.rmtree(self.shared, ignore_errors=True)


def start_observer(recipe: Recipe, ranks: Ranks, heartbeat: Heartbeat | None = None) -> tuple[Observer, str | None]:
    """Returns this rank's observer, and why no metrics are exported, if so. To be called by all ranks.

    Before the exporters of this start announce themselves, the main rank forgets those of an earlier one.
    """
    if not recipe.monitoring.enabled:
        return Observer(NullRecorder(), recipe, ranks, heartbeat=heartbeat), None
    if ranks.is_main:
        remove_targets(recipe.run_dir)
    own = uuid.uuid4().hex, run_label(recipe.run_dir)  # hosts may mount it under other paths
    token, run = from_main(own, tuple[str, str])
    shared = _shared_memory() / f"mixmae-{token}"
    try:
        recorder = Recorder(shared, ranks.rank)
    except OSError as error:
        return Observer(
            NullRecorder(), recipe, ranks, shared, heartbeat
        ), f"no metrics are exported: {shared}: {error.strerror}"
    observer = Observer(recorder, recipe, ranks, shared, heartbeat)
    if ranks.local_rank == 0:
        observer.export(run)
    return observer, None


def _shared_memory() -> Path:
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
