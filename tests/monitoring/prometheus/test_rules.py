import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixmae.monitoring.metrics import METRICS, Kind
from tests.helpers import ROOT
from tests.monitoring.services import needs

SHIPPED = ROOT / "monitoring"
UNIT_TESTS = sorted((Path(__file__).parent / "rules").glob("*.yml"))
RUNBOOK = (ROOT / "docs" / "alerts.md").read_text()


def rules(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((SHIPPED / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


RECORDED = {rule["record"]: rule for rule in rules("rules.yml")}
ALERTS = {rule["alert"]: rule for rule in rules("alerts.yml")}
SERIES = {metric.full_name: metric for metric in METRICS}
SUFFIXES = {
    f"{metric.full_name}{suffix}": metric
    for metric in METRICS
    if metric.kind is Kind.HISTOGRAM
    for suffix in ("_bucket", "_sum", "_count")
}


def unit_tests(section: str) -> list[dict[str, Any]]:
    files = [yaml.safe_load(file.read_text()) for file in UNIT_TESTS]
    return [case for file in files for test in file["tests"] for case in test.get(section, ())]


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"(?:\w+:)?mixmae_\w+(?::\w+)?", expression))


@pytest.mark.services
@pytest.mark.parametrize("file", UNIT_TESTS, ids=lambda file: file.stem)
def test_promtool_agrees(file: Path) -> None:
    done = run(needs("promtool", "prometheus"), "test", "rules", file.name, cwd=file.parent)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.services
def test_prometheus_takes_the_configuration() -> None:
    done = run(needs("promtool", "prometheus"), "check", "config", "prometheus.yml", cwd=SHIPPED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rule files found" in done.stdout


@pytest.mark.services
def test_alertmanager_takes_the_configuration() -> None:
    done = run(needs("amtool", "prometheus-alertmanager"), "check-config", "alertmanager.yml", cwd=SHIPPED)
    assert done.returncode == 0, done.stdout + done.stderr


def run(*command: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_is_tested(name: str) -> None:
    cases = [case for case in unit_tests("alert_rule_test") if case["alertname"] == name]
    fired = [position for position, case in enumerate(cases) if case["exp_alerts"]]
    assert fired, "fires in no test"
    assert min(fired) > 0, "no test says when it does not fire yet"
    assert any(not case["exp_alerts"] for case in cases[min(fired) + 1 :]), "no test says that it resolves"


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_has_a_real_fault_too(name: str) -> None:
    real = "".join((Path(__file__).parent / file).read_text() for file in ("test_faults.py", "test_restarts.py"))
    assert f'"{name}"' in real


@pytest.mark.parametrize("name", RECORDED)
def test_every_recorded_value_is_tested_and_used(name: str) -> None:
    assert any(name in case["expr"] and case["exp_samples"] for case in unit_tests("promql_expr_test"))
    others = [rule for rule in [*RECORDED.values(), *ALERTS.values()] if rule.get("record") != name]
    used = [name for rule in others for name in names_in(f"{rule['expr']} {rule.get('annotations', '')}")]
    assert name in used


@pytest.mark.parametrize(
    "rule", [*RECORDED.values(), *ALERTS.values()], ids=lambda rule: rule.get("record", rule.get("alert"))
)
def test_rules_use_metrics_that_exist(rule: dict[str, Any]) -> None:
    names = names_in(rule["expr"])
    assert names or "up{" in rule["expr"]
    for name in names:
        assert name in RECORDED or name in SUFFIXES or SERIES[name].kind is not Kind.HISTOGRAM
    raw = re.findall(r'(?<![\w:])(?:mixmae_\w+|up)\b(\{job="mixmae")?', rule["expr"])
    assert all(raw), "numbers that a Pushgateway keeps of ended runs are none of the rules'"
    for parts in re.findall(r"by \(([^)]*)\)", rule["expr"]):
        assert parts.split(", ")[0] == "run", "one Prometheus watches many runs"


@pytest.mark.parametrize("name", ALERTS)
def test_alerts_say_who_and_what_to_do(name: str) -> None:
    rule = ALERTS[name]
    notes = rule["annotations"]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(notes) == {"summary", "runbook", "runbook_url"}
    assert notes["summary"].startswith("Run {{ $labels.run }}: ")
    assert notes["runbook_url"] == f"docs/alerts.md#{name.lower()}"
    assert not any("\n" in note for note in notes.values())


def test_the_runbook_has_every_alert() -> None:
    assert re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE) == list(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_the_runbook_says_the_same(name: str) -> None:
    rule = ALERTS[name]
    section = " ".join(RUNBOOK.split(f"## {name}\n")[1].split("\n## ")[0].split())
    wait = f", after {rule['for']}" if "for" in rule else ""
    assert section.startswith(f"*{rule['labels']['severity']}{wait}* ")
    assert f"**Do:** {rule['annotations']['runbook']}" in section
