"""A node's metrics as Prometheus' metric families: its ranks' and its own, at the time of a scrape."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from mixmae.monitoring.exporter import node
from mixmae.monitoring.exporter.recorder import Value, cumulative, is_known, read_ranks
from mixmae.monitoring.metrics import METRICS, Kind, Metric, Source


class NodeCollector(Collector):
    """Collects what the ranks recorded, and reads the node."""

    def __init__(self, shared: Path, run_dir: Path) -> None:
        self._shared = shared
        self._disk, self._gpus = node.Disk(run_dir), node.Gpus()
        self._scrapes = 0

    def describe(self) -> Iterable[Family]:
        return [family_of(metric) for metric in METRICS]

    def collect(self) -> Iterator[Family]:
        self._scrapes += 1
        found: dict[str, list[tuple[int, Value]]] = defaultdict(list)
        for rank, values in read_ranks(self._shared):
            for value in filter(is_known, values):
                found[value.metric].append((rank, value))
        here = defaultdict(list)
        for reading in [*node.readings(self._disk, self._gpus), node.Reading("scrapes_total", (), self._scrapes)]:
            here[reading.metric].append(reading)
        for metric in METRICS:
            family = family_of(metric)
            if metric.source is Source.NODE:
                for reading in here[metric.name]:
                    family.add_metric(reading.labels, reading.value)
            elif metric.kind is Kind.HISTOGRAM:
                _add_histograms(family, metric, found[metric.name])
            elif metric.states:
                _add_states(family, metric, found[metric.name])
            else:
                for rank, value in found[metric.name]:
                    family.add_metric(_labels(metric, rank, value), value.value)
            if family.samples:
                yield family


def family_of(metric: Metric) -> Any:
    kinds = {Kind.COUNTER: CounterMetricFamily, Kind.GAUGE: GaugeMetricFamily, Kind.HISTOGRAM: HistogramMetricFamily}
    return kinds[metric.kind](metric.full_name, metric.help, labels=metric.label_names)


def _labels(metric: Metric, rank: int, value: Value) -> tuple[str, ...]:
    return (str(rank), *value.labels) if metric.source is Source.RANK else value.labels


def _add_histograms(family: Any, metric: Metric, values: list[tuple[int, Value]]) -> None:
    series: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for rank, value in values:
        series[_labels(metric, rank, value)][value.part] = value.value
    for labels, parts in series.items():
        family.add_metric(labels, cumulative(parts), parts.get("sum", 0.0))


def _add_states(family: Any, metric: Metric, values: list[tuple[int, Value]]) -> None:
    for rank, value in values:
        for number, state in enumerate(metric.states):
            family.add_metric((*_labels(metric, rank, value), state), float(number == value.value))
