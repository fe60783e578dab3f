"""`mixmae doctor` as it is typed: on this machine, and with services on hosts over ssh and under Slurm."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mixmae.launch.backends.slurm_script import SlurmRequest
from mixmae.launch.commands.doctor import _accelerators
from mixmae.launch.preflight.doctor_job import find_error_line, findings_in, job_findings
from mixmae.launch.preflight.login_checks import check_slurm, sort_nodes
from mixmae.launch.supervision.outcome import Outcome
from mixmae.trainer.doctor.protocol.findings import Finding, Level, finding_of
from tests.cluster.cluster import Cluster
from tests.helpers import ROOT
from tests.monitoring.services import needs
from tests.trainer.doctor.recipes import write_recipe

DOCTOR = [sys.executable, "-m", "mixmae.launch.cli", "doctor"]
SECONDS = 200
LATE = Finding(Level.WARNING, "clock", "node2", "42.0 s behind", "within 1 s", "start a time service")
FULL = Finding(Level.ERROR, "disk space", "node1", "1 GiB free", "3 GiB", "make room")


def typed(*argv: str | Path) -> "subprocess.CompletedProcess[str]":
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [*DOCTOR, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=SECONDS, check=False)


@pytest.fixture
def recipe(tmp_path: Path, shards: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", shards)


def test_findings_are_read_out_of_what_launchers_print() -> None:
    output = f"""\
[2026-01-01] [INFO] {{"level": "of logging"}}
{LATE.to_json()}
node1: {FULL.to_json()}
{LATE.to_json()[:40]}
node2: plain {{words}}
"""
    assert findings_in(output) == [LATE, FULL]


def test_how_a_job_ended_is_told_where_its_findings_do_not() -> None:
    ended = Outcome(1, "rank 0 on node1 ended with exit code 1", rank=0, host="node1")
    assert list(job_findings(ended, [FULL], "", ())) == []
    (alone,) = job_findings(ended, [LATE], "ImportError: x\n\n", ())
    assert (alone.level, alone.where) == (Level.ERROR, "node1")
    assert alone.found == "rank 0 on node1 ended with exit code 1: ImportError: x"
    other = Outcome(1, "rank 3 on node2 was killed by SIGKILL", rank=3, host="node2", lines=["Killed"])
    assert [f.found for f in job_findings(other, [FULL], "", ())] == ["rank 3 on node2 was killed by SIGKILL: Killed"]
    assert list(job_findings(Outcome(0, "finished"), [], "", ())) == []


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["node1: starting", "node2: ImportError: no libcudnn", "pdsh@login: node2: ssh exited with exit code 1"],
         ("node2", "ImportError: no libcudnn")),
        (["Traceback (most recent call last):", "torch.OutOfMemoryError: CUDA out of memory", "", "Terminated"],
         ("", "torch.OutOfMemoryError: CUDA out of memory")),
        (["slurmstepd: error: execve(): python: No such file or directory"],
         ("", "slurmstepd: error: execve(): python: No such file or directory")),
        (["bash: line 1: cd: /x: No such file", "  "], ("", "bash: line 1: cd: /x: No such file")),
        ([], ("", "")),
    ],
)  # fmt: skip
def test_the_line_that_says_what_went_wrong(lines: list[str], told: tuple[str, str]) -> None:
    assert find_error_line(lines, ["node1", "node2"]) == told


def test_nodes_are_sorted_by_what_sinfo_says() -> None:
    listed = "n1 idle\nn2 mixed\nn3 drained\nn4 down*\nn5 idle*\nn6 allocated+\nn7 idle~\nn8 planned\nn9 mixed-\n"
    usable, unusable = sort_nodes(listed + "n1 idle\n")  # once for each of its partitions
    assert usable == ["n1", "n2", "n6", "n7", "n8", "n9"]
    assert unusable == ["n3 (drained)", "n4 (down*)", "n5 (idle*)"]


def test_slurm_that_is_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = check_slurm(SlurmRequest(1, 1), None)
    assert (finding.level, finding.found) == (Level.ERROR, "sinfo is not on PATH")


def test_ranks_where_nobody_says_how_many() -> None:
    assert _accelerators({"CUDA_VISIBLE_DEVICES": "0,3,5"}) == 3
    assert _accelerators({}) >= 1


@pytest.mark.distributed
def test_two_ranks_here(recipe: Path) -> None:
    before = set(Path(tempfile.gettempdir()).glob("mixmae-doctor-*"))
    done = typed(recipe, "--local", "2", "--short", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert document["exit_code"] == 0
    checks = {finding["check"] for finding in document["findings"]}
    assert {"batch", "ranks", "recipe", "versions", "run directory", "shards", "all-reduce"} <= checks
    assert set(Path(tempfile.gettempdir()).glob("mixmae-doctor-*")) == before
    assert not (recipe.parent / "run").exists()


@pytest.mark.distributed
def test_the_table_and_the_exit_code_of_an_error(recipe: Path) -> None:
    done = typed(recipe, "data.shards=nowhere", "--local", "1", "--short")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].startswith("error")
    assert "shard directory nowhere does not exist" in done.stdout
    assert lines[-1].startswith("not ready: ")


def test_ranks_are_not_started_for_a_batch_that_does_not_divide(recipe: Path) -> None:
    done = typed(recipe, "--local", "3", "--json")
    assert done.returncode == 1
    found = [finding_of(fields) for fields in json.loads(done.stdout)["findings"]]
    assert [(finding.check, finding.level) for finding in found] == [("batch", Level.ERROR), ("ranks", Level.NOTE)]
    assert "does not divide" in found[0].found


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.yaml", "--local", "2"], "does not exist"),
        (["configs/pretrain/demo.yaml", "train.zero=1"], "did you mean"),
        (["--hostfile", "nowhere"], "hostfile nowhere does not exist"),
        (["--local", "0"], "expected 1 or more"),
        (["--local", "2", "--partition", "gpu"], "--partition goes with --slurm"),
        (["--slurm"], "needs --gpus-per-node"),
        (["--link", "fast"], "200gbps"),
    ],
)
def test_mistakes_in_the_command(argv: list[str], message: str) -> None:
    done = typed(*argv)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def silent_hostfile(tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """Options for a host whose ssh port takes connections and says nothing."""
    needs("pdsh", "pdsh")
    needs("ssh", "openssh-client")
    (tmp_path / "hostfile").write_text("127.0.0.1 slots=2\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield "--hostfile", str(tmp_path / "hostfile"), "--ssh-port", str(server.getsockname()[1])


@pytest.mark.services
def test_a_host_that_says_nothing(silent_hostfile: tuple[str, ...]) -> None:
    done = typed(*silent_hostfile, "--json")
    assert done.returncode == 1, done.stderr
    found = [finding_of(fields) for fields in json.loads(done.stdout)["findings"]]
    assert [(finding.check, finding.where) for finding in found] == [("ssh", "127.0.0.1"), ("ranks", "")]
    assert found[0].found == "it does not answer"


@pytest.mark.services
def test_whoever_interrupts_reads_no_traceback(silent_hostfile: tuple[str, ...]) -> None:
    with subprocess.Popen([*DOCTOR, *silent_hostfile], cwd=ROOT, stderr=subprocess.PIPE, text=True) as doctor:
        while not psutil.Process(doctor.pid).children():
            time.sleep(0.05)
        doctor.send_signal(signal.SIGINT)
        _, errors = doctor.communicate(timeout=SECONDS)
    assert doctor.returncode == 130
    assert errors == "mixmae: interrupted\n"


PREFLIGHT = """
import sys
from pathlib import Path
from mixmae.launch.preflight.preflight import preflight
from mixmae.launch.backends.local import LocalBackend
from mixmae.trainer.recipe.loading import load_recipe
words = tuple(sys.argv[1:])
sys.exit(preflight(LocalBackend(2), load_recipe(Path(words[0]), words[1:])))
"""


@pytest.mark.distributed
def test_before_a_launch_only_what_is_wrong_is_shown(recipe: Path) -> None:
    command = [sys.executable, "-c", PREFLIGHT, str(recipe)]
    good = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (good.returncode, good.stdout) == (0, ""), good.stderr
    assert good.stderr.splitlines()[-1].startswith("ready: 0 errors, 0 warnings in")
    bad = subprocess.run([*command, "data.shards=nowhere"], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS,
                         check=False)  # fmt: skip
    assert bad.returncode == 1
    assert "shard directory nowhere does not exist" in bad.stderr
    assert "\nok " not in bad.stderr


def on_cluster(cluster: Cluster, *argv: str | Path, code: int = 0, **env: str) -> list[Finding]:
    """What the doctor finds when it is typed on the cluster's login host."""
    done = cluster.login.run([*DOCTOR, *map(str, argv), "--json"], env={"OMP_NUM_THREADS": "1", **env}, timeout=SECONDS)
    assert done.returncode == code, done.stdout + done.stderr
    return [finding_of(fields) for fields in json.loads(done.stdout)["findings"]]


@pytest.fixture
def on_shared(cluster: Cluster, tmp_path: Path, shards: Path) -> Iterator[Path]:
    """A recipe whose run directory all hosts share, and that leaves nothing there."""
    before = set(cluster.shared.iterdir())
    yield write_recipe(tmp_path / "recipe.yaml", cluster.shared / "run", shards)
    assert set(cluster.shared.iterdir()) == before


@pytest.mark.services
def test_two_hosts_of_a_hostfile(cluster: Cluster, on_shared: Path) -> None:
    before = set(Path(tempfile.gettempdir()).glob("mixmae-doctor-*"))
    found = on_cluster(cluster, on_shared, "--hostfile", cluster.hostfile(slots=1), "--link", "1Mbps")
    assert {finding.level for finding in found} <= {Level.OK, Level.NOTE}
    by_check = {finding.check: finding.found for finding in found}
    assert by_check["ranks"] == "2 arrived: 1 on node1, 1 on node2"
    assert {"ssh", "ports", "all-reduce", "clock", "run directory", "shards"} <= by_check.keys()
    assert set(Path(tempfile.gettempdir()).glob("mixmae-doctor-*")) == before


@pytest.mark.services
def test_a_host_that_is_down_stops_all_before_ranks_start(cluster: Cluster, on_shared: Path) -> None:
    cluster.hosts[1].disconnect()
    try:
        found = on_cluster(cluster, on_shared, "--hostfile", cluster.hostfile(), code=1)
    finally:
        cluster.hosts[1].reconnect()
    wrong = [finding for finding in found if finding.level is Level.ERROR]
    assert [(finding.check, finding.where) for finding in wrong] == [("ssh", "node2")]
    assert "not started" in next(finding.found for finding in found if finding.check == "ranks")


@pytest.mark.services
def test_a_launch_looks_first_and_is_never_a_smaller_run(cluster: Cluster, on_shared: Path) -> None:
    launch = [
        sys.executable,
        "-m",
        "mixmae.launch.cli",
        "launch",
        str(on_shared),
        "--hostfile",
        str(cluster.hostfile()),
    ]
    cluster.hosts[1].disconnect()
    try:
        done = cluster.login.run(launch, timeout=SECONDS)
    finally:
        cluster.hosts[1].reconnect()
    assert done.returncode == 2
    assert re.search(r"^error +ssh +node2 +it does not answer", done.stderr, re.MULTILINE), done.stderr
    assert not (cluster.shared / "run").exists()


@pytest.mark.services
def test_a_host_whose_packages_are_broken(cluster: Cluster, on_shared: Path) -> None:
    packages = cluster.local / "packages"
    for host in cluster.hosts:
        host.run(["mkdir", packages], check=True)
    cluster.hosts[1].run(["sh", "-c", f"echo 'raise ImportError(\"no libcudnn\")' > {packages}/torch.py"], check=True)
    try:
        argv = on_shared, "--hostfile", cluster.hostfile(slots=1)
        found = on_cluster(cluster, *argv, code=1, PYTHONPATH=f"{packages}:{ROOT}")
    finally:
        for host in cluster.hosts:
            host.run(["rm", "-r", packages], check=True)
    job = next(finding for finding in found if finding.check == "job")
    assert (job.level, job.where) == (Level.ERROR, "node2"), job
    assert job.found.endswith("ImportError: no libcudnn")


@pytest.mark.services
def test_two_nodes_of_slurm(cluster: Cluster, on_shared: Path) -> None:
    argv = "--slurm", "--nodes", "2", "--gpus-per-node", "1", "--link", "1Mbps"
    found = on_cluster(cluster, on_shared, *argv)
    assert {finding.level for finding in found} <= {Level.OK, Level.NOTE}
    by_check = {finding.check: finding.found for finding in found}
    assert by_check["Slurm"] == "2 usable nodes"
    assert by_check["ranks"] == "2 arrived: 1 on node1, 1 on node2"


@pytest.mark.services
def test_slurm_without_enough_nodes(cluster: Cluster, on_shared: Path) -> None:
    drain = ["scontrol", "update", "nodename=node2"]
    cluster.login.run([*drain, "state=drain", "reason=test"], check=True)
    try:
        argv = "--slurm", "--nodes", "2", "--gpus-per-node", "2"
        found = on_cluster(cluster, on_shared, *argv, code=1)
    finally:
        cluster.login.run([*drain, "state=resume"], check=True)
    wrong = [finding for finding in found if finding.level is Level.ERROR]
    assert [(finding.check, finding.found) for finding in wrong] == [
        ("Slurm", "1 usable nodes, 1 not: node2 (drained)")
    ]
