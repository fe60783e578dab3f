"""The thresholds of stuck runs are the same wherever they are used."""

import re

from mixmae.base.liveness import JOIN_SECONDS, SILENT_SECONDS, STALL_SECONDS, STUCK_SECONDS
from mixmae.monitoring.exporter.server import Settings
from mixmae.trainer.doctor.message_store import ARRIVAL_SECONDS
from mixmae.trainer.recipe.sections.launch import Launch
from mixmae.trainer.recipe.sections.monitoring import Monitoring
from tests.helpers import ROOT


def test_a_lost_process_is_noticed_before_a_stuck_run_and_a_stall_is_told_before_it_is_ended() -> None:
    assert SILENT_SECONDS < JOIN_SECONDS < STALL_SECONDS < STUCK_SECONDS


def test_defaults_are_derived() -> None:
    assert (Launch().join_seconds, Launch().stuck_seconds, ARRIVAL_SECONDS) == (
        JOIN_SECONDS,
        STUCK_SECONDS,
        JOIN_SECONDS,
    )
    assert Monitoring().stall_seconds == STALL_SECONDS
    assert Settings.__dataclass_fields__["stall_seconds"].default == STALL_SECONDS


def test_the_alert_fires_when_a_launch_would_end_the_run() -> None:
    rules = (ROOT / "monitoring" / "alerts.yml").read_text()
    (threshold,) = re.findall(r"alert: MixmaeNoProgress.*?> (\d+) \+", rules, re.DOTALL)
    assert float(threshold) == STUCK_SECONDS
