"""Starts on real hosts: sshd, pdsh and Slurm of the test cluster."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from mixmae.base.exit_codes import FAILED, PREEMPTED
from mixmae.launch.backends.job_spec import JobSpec
from mixmae.launch.backends.site import Site
from mixmae.launch.backends.slurm_script import SlurmRequest, slurm_script
from mixmae.launch.supervision.restarts import read_restarts
from mixmae.trainer.recipe.sections.launch import Launch
from tests.cluster.cluster import Cluster
from tests.helpers import ROOT, tiny_recipe
from tests.launch.fake_rank import SETTINGS
from tests.launch.ranks import FAKE_RANK

pytestmark = pytest.mark.services
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SECONDS = 600.0
START = """
import sys
from pathlib import Path
from mixmae.launch.backends.hostfile import HostfileBackend, master_address
from mixmae.launch.backends.hostfile_parser import read_hostfile
from mixmae.launch.backends.job_spec import JobSpec
from mixmae.launch.supervision.restart_loop import run_with_restarts
from mixmae.trainer.recipe.sections.launch import Launch
hostfile, run_dir, *settings = sys.argv[1:]
hosts = read_hostfile(Path(hostfile))
job = JobSpec("tests.launch.fake_rank", (f"run_dir={run_dir}", *settings), Path(run_dir), Launch(port=21000))
sys.exit(run_with_restarts(job, HostfileBackend(hosts, master_address(hosts)), 0))
"""


@pytest.fixture
def run_dir(cluster: Cluster, request: pytest.FixtureRequest) -> Path:
    return cluster.shared / request.node.name.replace("[", "-").rstrip("]")


def on_hosts(cluster: Cluster, run_dir: Path, *settings: str) -> "subprocess.Popen[str]":
    """A run of fake ranks, one on each host, started from the login host."""
    hostfile = cluster.hostfile(slots=1)
    command = [sys.executable, "-c", START, str(hostfile), str(run_dir), *settings]
    return cluster.login.popen(command, ENVIRONMENT, ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def saved(run_dir: Path) -> bool:
    return (run_dir / "checkpoints" / "newest").exists()


def left(cluster: Cluster, run_dir: Path) -> list[Sequence[str]]:
    """What still runs of a run, on any host."""
    found: list[Sequence[str]] = []
    for host in (*cluster.hosts, cluster.login):
        for process in host.processes(str(run_dir)):
            with suppress(psutil.NoSuchProcess):  # it has ended since it was listed
                found.append(process.cmdline())
    return found


@pytest.mark.timeout(SECONDS)
def test_one_killed_rank_ends_both_hosts(cluster: Cluster, run_dir: Path) -> None:
    started = on_hosts(cluster, run_dir, "steps=100000")
    wait_for(lambda: saved(run_dir))
    assert cluster.host("node2").kill(f"-m {FAKE_RANK}") == 1
    output = started.communicate()[0]
    assert started.returncode == FAILED
    reason = "rank 1 on node2 was killed by SIGKILL; the kernel does that when the host runs out of memory"
    assert output.splitlines()[-1] == f"mixmae: error: {reason}"
    assert "rank-00001.log, rank 1 on node2:" in output
    assert left(cluster, run_dir) == []


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_launching_process_takes_all_ranks_along(cluster: Cluster, run_dir: Path, number: signal.Signals) -> None:
    started = on_hosts(cluster, run_dir, "steps=100000")
    wait_for(lambda: saved(run_dir))
    started.send_signal(number)
    started.communicate()
    if number == signal.SIGTERM:
        assert started.returncode == PREEMPTED
        assert left(cluster, run_dir) == []
    wait_for(lambda: not left(cluster, run_dir), 60)


@pytest.mark.timeout(SECONDS)
def test_an_unreachable_host_ends_the_run_and_is_named(cluster: Cluster, run_dir: Path) -> None:
    started = on_hosts(cluster, run_dir, "steps=100000")
    wait_for(lambda: saved(run_dir))
    try:
        cluster.host("node2").disconnect()
        output = started.communicate()[0]
        assert started.returncode == FAILED
        assert "rank 1 on node2 has been silent for 20 s" in output.splitlines()[-1]
        wait_for(lambda: not left(cluster, run_dir), 60)
    finally:
        cluster.repair()


@pytest.mark.timeout(SECONDS)
def test_a_host_that_is_down_from_the_start_is_named(cluster: Cluster, run_dir: Path) -> None:
    try:
        cluster.host("node2").disconnect()
        started = on_hosts(cluster, run_dir)
        output = started.communicate()[0]
        assert started.returncode == FAILED
        assert output.splitlines()[-1].startswith("mixmae: error: host node2: ssh ended with exit code 255")
        assert left(cluster, run_dir) == []
    finally:
        cluster.repair()


def submitted(cluster: Cluster, run_dir: Path, tasks: str, *settings: str, array: str | None = None) -> int:
    """A job of fake ranks, one on each node."""
    job = JobSpec(FAKE_RANK, (f"run_dir={run_dir}", *settings), run_dir, Launch.model_validate({"tasks": tasks}))
    for task in range(2):
        Path(str(run_dir).replace("{task}", str(task)), "logs").mkdir(parents=True, exist_ok=True)
    script = cluster.shared / "job.sh"
    script.write_text(slurm_script(job, SlurmRequest(2, 1, name="fake-ranks", array=array), Site(), 3))
    return cluster.slurm.sbatch(script, env=ENVIRONMENT, cwd=ROOT)


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("tasks", ["per_gpu", "per_node"])
def test_a_preempted_job_goes_back_to_the_queue_and_finishes(cluster: Cluster, run_dir: Path, tasks: str) -> None:
    job = submitted(cluster, run_dir, tasks, "steps=60")
    wait_for(lambda: saved(run_dir))
    cluster.slurm.cancel(job, "--batch", "--signal=USR1")
    assert cluster.slurm.wait(job, timeout=SECONDS) == "COMPLETED"
    log = cluster.slurm.log(job)
    assert "stopped by SIGUSR1 after step" in log
    assert "mixmae: stopped by SIGUSR1 to the job; the same command continues the run" in log
    assert log.rstrip().endswith("done")
    (record,) = read_restarts(run_dir)
    assert (record["reason"], record["slurm_restart_count"], record["launch"]) == ("preempted", 1, f"job{job}")


@pytest.mark.timeout(SECONDS)
def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, run_dir: Path) -> None:
    job = submitted(cluster, run_dir, "per_gpu", "steps=100000")
    wait_for(lambda: saved(run_dir))
    cluster.slurm.cancel(job)
    assert cluster.slurm.wait(job, timeout=SECONDS) == "CANCELLED"
    assert cluster.slurm.exit_code(job) == PREEMPTED
    assert "stopped by SIGTERM" in cluster.slurm.log(job)
    assert not read_restarts(run_dir)


@pytest.mark.timeout(SECONDS)
def test_tasks_of_an_array_share_nodes_and_requeue_each_by_itself(cluster: Cluster, run_dir: Path) -> None:
    place = run_dir / "{task}"
    job = submitted(cluster, place, "per_gpu", "steps=60", array="0-1")
    wait_for(lambda: saved(run_dir / "0") and saved(run_dir / "1"))
    cluster.login.run(["scancel", "--batch", "--signal=USR1", f"{job}_1"], check=True)
    ends = [run_dir / str(task) / "logs" / f"slurm-{job}_{task}.out" for task in range(2)]
    wait_for(lambda: all("done" in end.read_text() for end in ends))
    assert [len(read_restarts(run_dir / str(task))) for task in range(2)] == [0, 1]
    cluster.slurm.wait_until_idle()


@pytest.mark.timeout(SECONDS)
def test_a_job_runs_the_recipe_of_its_submission(cluster: Cluster, run_dir: Path) -> None:
    """An array whose file is changed while it is queued, and one task of which is requeued."""
    place = run_dir.with_name("frozen")
    recipe, site = cluster.shared / "frozen.yaml", cluster.shared / "site.yaml"
    recipe.write_text(tiny_recipe(**{"optim.eps": 0.5}).to_yaml())
    site.write_text("sbatch: [--hold]\n")
    settings = json.dumps({"steps": 60})
    typed = [sys.executable, "-m", "tests.launch.launch_fake_ranks", str(recipe), "--site", str(site), "--slurm"]
    values = ["--array", "0-1", "seed={task}", f"run_dir={place}/{{task}}"]
    size = ["--nodes", "2", "--tasks-per-node", "1", "--skip-preflight"]
    done = cluster.login.run([*typed, *size, *values], {**ENVIRONMENT, SETTINGS: settings}, ROOT, check=True)
    job = int(done.stdout)
    recipe.write_text("edited: while it was queued")
    cluster.login.run(["scontrol", "release", str(job)], check=True)
    wait_for(lambda: saved(place / "0") and saved(place / "1"))
    cluster.login.run(["scancel", "--batch", "--signal=USR1", f"{job}_1"], check=True)
    ends = [place / str(task) / "logs" / f"slurm-{job}_{task}.out" for task in range(2)]
    wait_for(lambda: all("done" in end.read_text() for end in ends))
    cluster.slurm.wait_until_idle()
    for task, starts in enumerate([1, 2]):
        logs = list((place / str(task) / "logs").glob("*/rank-*.log"))
        assert [log.read_text().splitlines()[0] for log in logs] == [f"seed {task}"] * 2 * starts


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("program", ["deepspeed", "srun"])
def test_ranks_started_by_hand(cluster: Cluster, run_dir: Path, shards: Path, program: str) -> None:
    settings = {"data.shards": str(shards), "run_dir": str(run_dir), "monitoring.enabled": False}
    run_dir.mkdir()
    recipe = run_dir / "typed.yaml"
    recipe.write_text(tiny_recipe(**{**settings, "train.duration": "3 steps"}).to_yaml())
    if program == "deepspeed":
        hostfile = cluster.hostfile(slots=1)
        typed = ["deepspeed", "--hostfile", str(hostfile), "--module", "mixmae.trainer.train", str(recipe)]
    else:
        ask = ["--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
        typed = ["srun", *ask, sys.executable, "-m", "mixmae.trainer.train", str(recipe)]
    done = cluster.login.run(typed, {**ENVIRONMENT, "DS_ACCELERATOR": "cpu"}, ROOT, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3]
    assert [event["world_size"] for event in events if event["event"] == "start"] == [2]


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("tasks", ["per_gpu", "per_node"])
def test_a_job_looks_at_its_nodes_first(cluster: Cluster, run_dir: Path, shards: Path, tasks: str) -> None:
    """It trains where all is well, and says what is not where a shard has gone."""
    data = cluster.shared / f"shards-{tasks}"
    shutil.copytree(shards, data)
    settings = {"data.shards": str(data), "run_dir": str(run_dir), "launch.tasks": tasks, "train.duration": "3 steps"}
    recipe = cluster.shared / f"{tasks}.yaml"
    recipe.write_text(tiny_recipe(**settings, **{"monitoring.enabled": False}).to_yaml())
    typed = [
        sys.executable,
        "-m",
        "mixmae.launch.cli",
        "launch",
        str(recipe),
        "--slurm",
        "--nodes=2",
        "--tasks-per-node=1",
    ]

    def ends() -> tuple[str, str]:
        done = cluster.login.run(typed, ENVIRONMENT, ROOT, check=True)
        job = int(done.stdout)
        return cluster.slurm.wait(job, timeout=SECONDS), (run_dir / "logs" / f"slurm-{job}.out").read_text()

    state, output = ends()
    assert state == "COMPLETED", output
    assert output.index("all-reduce") < output.index("step 2")
    next(data.glob("*.tar")).unlink()
    state, output = ends()
    assert state == "FAILED"
    assert "missing" in output
    assert output.splitlines()[-1].startswith("mixmae: error: preflight checks found errors on the nodes, shown")
