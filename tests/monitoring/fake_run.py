"""A run that never was: believable values of every metric as functions of time, so that the past is as easy as the now.

The last rank is slow, the first node reads badly, and checkpoints are saved every twelve minutes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from mixmae.base.phases import PHASES
from mixmae.base.software import versions
from mixmae.monitoring.exporter.collector import family_of
from mixmae.monitoring.metrics import ENDS, METRICS, STEP_BUCKETS, Kind, Metric, Source

GIB = 2.0**30
CHECKPOINT_EVERY = 720.0
BATCH = 512
"""Images of a rank's step."""
VERSIONS = [versions()[package] for package in ("torch", "deepspeed", "mixmae")]


class Observed(NamedTuple):
    """What a histogram holds."""

    number: float
    total: float
    slow: float
    """Of the observations, those that took thrice the mean."""


Values = dict[tuple[str, ...], float | Observed]
"""By the values of a metric's labels."""


class FakeRun(NamedTuple):
    """`start` is in unix seconds; every function takes the time at which it is asked."""

    name: str
    start: float
    ranks: int = 8
    per_node: int = 8
    steps: int = 60_000
    step_seconds: float = 0.42

    @property
    def nodes(self) -> list[str]:
        return [f"node{n:02d}" for n in range(-(-self.ranks // self.per_node))]

    def ranks_of(self, node: str) -> range:
        first = self.nodes.index(node) * self.per_node
        return range(first, min(first + self.per_node, self.ranks))

    def step(self, now: float) -> float:
        return math.floor((now - self.start) / self.step_seconds)

    def values(self, metric: Metric, node: str, now: float) -> Values:
        """What this node's exporter knows of a metric."""
        if metric.source is Source.RANK:
            found = {rank: self._of_rank(metric.name, rank, now) for rank in self.ranks_of(node)}
            return {(str(rank), *labels): value for rank, values in found.items() for labels, value in values.items()}
        if metric.source is Source.MAIN:
            return self._of_main(metric.name, now) if node == self.nodes[0] else {}
        return self._of_node(metric.name, node, now)

    def _of_main(self, name: str, now: float) -> Values:
        step, age = self.step(now), now - self.start
        done = step / self.steps
        logged = 10 * (step // 10)
        speed = self._images_per_second(now)
        saves, last = divmod(age, CHECKPOINT_EVERY)
        warmup = min(1.0, step / 1500)
        single: dict[str, float | Observed] = {
            "target_steps": self.steps,
            "epoch": step * BATCH * self.ranks / 1_281_167,
            "start_timestamp_seconds": self.start,
            "estimated_end_timestamp_seconds": now + (self.steps - step) * self.step_seconds,
            "images_per_second": speed,
            "model_flops_per_second": speed * 2.6e11,
            "mfu_ratio": speed * 2.6e11 / (self.ranks * 9.89e14),
            "loss": 0.41 + 0.62 * math.exp(-step / 1600) + 0.012 * _noise(logged) * (0.3 + math.exp(-step / 2500)),
            "gradient_norm": 0.35 + 1.9 * math.exp(-step / 900) + 0.09 * abs(_noise(logged, 1)),
            "learning_rate": 6e-4 * warmup * (0.5 + 0.5 * math.cos(math.pi * done)),
            "weight_decay": 0.05,
            "world_size": self.ranks,
            "skipped_steps_total": sum(step > at for at in (2100, 5200)),
            "checkpoint_seconds": Observed(saves, 0.4 * saves, saves // 8),
            "checkpoint_write_seconds": Observed(saves, 6.5 * saves, saves // 8),
            "checkpoint_bytes": 1.42 * GIB,
            "checkpoint_timestamp_seconds": now - last,
            "checkpoint_failures_total": float(age > 2000),
        }
        if name == "run_info":
            what = ("5f0c2e81a9b3", "mixmae_swin_base_w14", "88.9M", str(self.ranks), "1", "bf16", *VERSIONS)
            return {what: 1}
        if name == "resumes_total":
            return {(reason,): float(reason == "preempted" and age > 2400) for reason in ENDS}
        if name == "evaluation":
            return {
                ("top1",): 0.8 * done, ("loss",): 2.0 - done, ("probe_knn",): 0.6 * done, ("probe_linear",): 0.7 * done,
                ("probe_mean_cosine",): 0.9 - done / 2, ("probe_effective_rank",): 40 + 60 * done,
            }  # fmt: skip
        if name == "evaluations_below_highest":
            return {("probe_knn",): 0.0, ("probe_linear",): 0.0}
        return {(): single[name]}

    def _of_rank(self, name: str, rank: int, now: float) -> Values:
        step, age = self.step(now), now - self.start
        wave = 1 + 0.02 * math.sin(rank)
        memory = 61 * GIB * wave * (1 + 0.01 * _noise(now // 60, rank))
        single: dict[str, float | Observed] = {
            "optimizer_steps_total": step,
            "images_total": step * BATCH,
            "heartbeat_timestamp_seconds": now - (now - self.start) % self.step_seconds - 0.1 * (rank % 3),
            "step": step,
            "alive_timestamp_seconds": now - 0.3 * (rank % 3),
            "parts_total": 4 * step + (2 if self._is_slow(rank, now) else 3),
            "device_memory_allocated_bytes": memory,
            "device_memory_reserved_bytes": memory + 3 * GIB,
            "device_memory_peak_bytes": 66 * GIB * wave,
            "device_memory_limit_bytes": 79.2 * GIB,
            "resident_memory_bytes": (5.1 + 0.2 * math.sin(rank)) * GIB + 2000 * step,
            "open_files": 112 + rank % 5,
            "read_bytes_total": step * BATCH * 109_000 * wave,
            "read_retries_total": math.floor(age / 400) * (3 if rank < self.per_node else 1),
            "data_queue_batches": 12 + round(4 * _noise(now // 5, rank)) - 6 * self._is_slow(rank, now),
            "step_seconds": Observed(step, step * self.step_seconds, 0.04 * step + 4 * math.sin(now / 90)),
        }
        if name in single:
            return {(): single[name]}
        present = "forward" if self._is_slow(rank, now) else "backward"
        labelled: dict[str, Values] = {
            "step_part_seconds": {
                (part,): Observed(step, total, 0.04 * step) for part, total in self._parts(rank, now).items()
            },
            "rank_part": {(phase,): float(phase == present) for phase in PHASES},
            "cache_blocks_total": {("found",): 3.1 * step, ("fetched",): step / 9},
            "communication_bytes_total": {
                ("reduce_scatter",): step * 3.5e8, ("all_gather",): step * 1.8e8, ("all_reduce",): step * 64.0
            },
            "communication_seconds_total": {
                ("reduce_scatter",): step * 0.03, ("all_gather",): step * 0.02, ("all_reduce",): step * 2e-4
            },
            "replaced_samples_total": {("decode",): age // 300, ("truncated",): age // 900 if rank < 4 else 0},
        }  # fmt: skip
        return labelled[name]

    def _of_node(self, name: str, node: str, now: float) -> Values:
        number = self.nodes.index(node)
        if name.startswith("gpu_"):
            gpus = {rank % self.per_node for rank in self.ranks_of(node)}
            return {(str(gpu),): _of_gpu(name, gpu, now) for gpu in gpus}
        free = 2.1e12 - 4e7 * (now - self.start)
        return {
            (): {
                "node_memory_available_bytes": (1490 + 20 * _noise(now // 60, number)) * GIB,
                "node_memory_total_bytes": 2015 * GIB,
                "run_dir_free_bytes": free,
                "run_dir_size_bytes": 6e12,
                "shm_free_bytes": (880 + 6 * _noise(now // 30, number)) * GIB,
                "scrapes_total": (now - self.start) // 15,
            }[name]
        }

    def _images_per_second(self, now: float) -> float:
        saving = 0.86 if (now - self.start) % CHECKPOINT_EVERY < 20 else 1.0
        return BATCH * self.ranks / self.step_seconds * saving * (1 + 0.008 * _noise(now // 5, 2))

    def _is_slow(self, rank: int, now: float) -> bool:
        return rank == self.ranks - 1 and now % 900 < 300

    def _parts(self, rank: int, now: float) -> dict[str, float]:
        """Seconds spent in the parts of steps: all wait in backward for the last rank, which is slow in forward."""
        step = self.step(now)
        swing = 90 * math.sin(now / 130 + rank / 9) + 12 * math.sin(now / 23 + rank)  # grows slower than steps do
        forward = 0.36 if rank == self.ranks - 1 else 0.27 + 0.01 * math.sin(7 * rank)
        shares = {
            "data_wait": (0.04 + 0.02 * math.sin(3 * rank)) * (step + swing),
            "forward": forward * (step - swing / 20),
            "optimizer": 0.06 * step,
            "logging": 0.006 * step,
            "checkpoint": 0.02 * step,
        }
        shares["backward"] = 0.985 * step - sum(shares.values())
        return {part: share * self.step_seconds for part, share in shares.items()}


def _of_gpu(name: str, gpu: int, now: float) -> float:
    return {
        "gpu_utilization_ratio": 0.97 + 0.02 * _noise(now // 30, gpu),
        "gpu_power_watts": 610 + 40 * _noise(now // 30, gpu),
        "gpu_temperature_celsius": 58 + gpu % 7 + 2 * _noise(now // 60, gpu),
    }[name]


class _Node(Collector):
    def __init__(self, run: FakeRun, node: str, clock: Any) -> None:
        self.run, self.node, self.clock = run, node, clock

    def collect(self) -> Iterator[Any]:
        now = self.clock()
        for metric in METRICS:
            values = self.run.values(metric, self.node, now)
            if values:
                yield _family(metric, values)


@contextmanager
def served(run: FakeRun, clock: Any) -> Iterator[dict[str, str]]:
    """Serves the run as its exporters would; gives `host:port` by node."""
    targets = {}
    with ExitStack() as stack:
        for node in run.nodes:
            registry = CollectorRegistry()
            registry.register(_Node(run, node, clock))
            server, _ = start_http_server(0, "127.0.0.1", registry)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            targets[node] = f"127.0.0.1:{server.server_port}"
        yield targets


def target_files(run: FakeRun, targets: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """What is in the run's target files, by node."""
    return {n: [{"targets": [a], "labels": {"run": run.name, "node": n}}] for n, a in targets.items()}


def history(runs: Iterable[tuple[FakeRun, Mapping[str, str]]], times: Iterable[float]) -> Iterator[str]:
    """What Prometheus would have stored of runs and their targets, as OpenMetrics text for promtool."""
    runs, times = list(runs), list(times)
    yield "# TYPE up gauge\n"
    for run, targets in runs:
        for node, address in targets.items():
            yield from (f"up{{{_where(run, node, address)}}} 1 {now:.3f}\n" for now in times)
    for metric in METRICS:
        name = metric.full_name.removesuffix("_total") if metric.kind is Kind.COUNTER else metric.full_name
        yield f"# TYPE {name} {metric.kind}\n"
        for run, targets in runs:
            for node, address in targets.items():
                where = _where(run, node, address)
                for now in times:
                    for labels, value in run.values(metric, node, now).items():
                        own = ",".join(f'{k}="{v}"' for k, v in zip(metric.label_names, labels, strict=True))
                        yield from _lines(metric, f"{where},{own}" if own else where, value, now)
    yield "# EOF\n"


def _where(run: FakeRun, node: str, address: str) -> str:
    return f'job="mixmae",run="{run.name}",node="{node}",instance="{address}"'


def _lines(metric: Metric, labels: str, value: float | Observed, now: float) -> Iterator[str]:
    if not isinstance(value, Observed):
        yield f"{metric.full_name}{{{labels}}} {float(value)} {now:.3f}\n"
        return
    for bound, count in _buckets(value):
        yield f'{metric.full_name}_bucket{{{labels},le="{bound}"}} {count} {now:.3f}\n'
    yield f"{metric.full_name}_sum{{{labels}}} {value.total} {now:.3f}\n"
    yield f"{metric.full_name}_count{{{labels}}} {value.number} {now:.3f}\n"


def _family(metric: Metric, values: Values) -> Any:
    family = family_of(metric)
    for labels, value in values.items():
        if isinstance(value, Observed):
            family.add_metric(labels, _buckets(value), value.total)
        else:
            family.add_metric(labels, float(value))
    return family


def _buckets(observed: Observed) -> list[tuple[str, float]]:
    """Cumulative: most observations lie around the mean of all, some take half as much again, few thrice."""
    count, total, slow = observed
    mean = total / count if count else 0.0
    numbers = {0.7: 0.3 * count, 0.9: 0.58 * count - slow, 1.5: 0.12 * count, 3.0: slow}
    bounds = [*STEP_BUCKETS, math.inf]
    within = [math.floor(sum(n for factor, n in numbers.items() if factor * mean <= bound) + 1e-6) for bound in bounds]
    return [(floatToGoString(bound), float(n)) for bound, n in zip(bounds, [*within[:-1], count], strict=True)]


def _noise(moment: float, seed: int = 0) -> float:
    """Between -1 and 1, the same whenever it is asked for."""
    x = math.sin(12.9898 * moment + 78.233 * seed) * 43758.5453
    return 2 * (x - math.floor(x)) - 1
