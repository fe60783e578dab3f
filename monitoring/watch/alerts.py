"""A run's firing alerts, as Prometheus has them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from mixmae.base.json_text import parse_json
from mixmae.monitoring.exporter.access import UNREACHABLE, describe_error, fetch
from mixmae.monitoring.watch.poller import Poller


@dataclass(frozen=True)
class Alert:
    name: str
    severity: str
    since: float
    text: str


class Prometheus:
    """A run's firing alerts."""

    def __init__(self, url: str, labels: Mapping[str, str]) -> None:
        """`labels` are those that an alert of this run has."""
        self.url, self._labels = url.rstrip("/"), labels
        self.problem: str | None = None
        self.alerts: tuple[Alert, ...] = ()

    def poll(self, now: float) -> None:
        try:
            self.alerts = parse_alerts(fetch(f"{self.url}/api/v1/alerts").decode(), self._labels)
        except UNREACHABLE as error:
            self.problem, self.alerts = describe_error(error), ()
        else:
            self.problem = None


def parse_alerts(text: str, labels: Mapping[str, str]) -> tuple[Alert, ...]:
    """Firing alerts that have `labels`, newest first.

    Raises:
        ValueError: not a response of Prometheus' /api/v1/alerts.
    """
    try:
        found = [
            Alert(
                alert["labels"]["alertname"],
                alert["labels"].get("severity", ""),
                datetime.fromisoformat(alert["activeAt"]).timestamp(),
                alert.get("annotations", {}).get("summary", ""),
            )
            for alert in parse_json(text)["data"]["alerts"]
            if alert["state"] == "firing" and labels.items() <= alert["labels"].items()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("not a response of Prometheus' /api/v1/alerts") from error
    return tuple(sorted(found, key=lambda alert: -alert.since))


class FiringAlerts:
    """A run's firing alerts, if a Prometheus server is given."""

    def __init__(self, url: str | None, labels: Mapping[str, str], interval: float) -> None:
        self._prometheus = Prometheus(url, labels) if url is not None else None
        self.pollers = [Poller(self._prometheus.poll, interval)] if self._prometheus is not None else []

    @property
    def alerts(self) -> Sequence[Alert] | None:
        return self._prometheus.alerts if self._prometheus is not None and self._prometheus.problem is None else None

    def notes(self) -> Iterator[str]:
        if self._prometheus is not None and self._prometheus.problem is not None:
            yield f"alerts are not shown: Prometheus at {self._prometheus.url}: {self._prometheus.problem}"
