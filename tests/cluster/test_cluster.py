"""Hosts of a test cluster behave like real ones, also under faults."""

import errno
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster import clock
from tests.cluster.cluster import Cluster

pytestmark = pytest.mark.services

FLOATS = 1_000_000

REDUCE = f"""
import os, socket, torch
from torch import distributed

torch.set_num_threads(1)
rank = int(os.environ["SLURM_PROCID"])
distributed.init_process_group("gloo", "tcp://node1:29400", rank=rank, world_size=2)
numbers = torch.full(({FLOATS},), float(rank + 1))
distributed.all_reduce(numbers)
print(socket.gethostname(), numbers.unique().tolist())
distributed.destroy_process_group()
"""


def test_ssh_and_pdsh_reach_every_host_by_name(cluster: Cluster) -> None:
    for host in cluster.hosts:
        assert cluster.login.run(["ssh", host.name, "hostname"]).stdout == f"{host.name}\n"
        assert cluster.login.run(["ssh", host.address, "hostname"]).stdout == f"{host.name}\n"
    answers = cluster.login.run(["pdsh", "-S", "-w", "node1,node2", "hostname"])
    assert sorted(answers.stdout.splitlines()) == ["node1: node1", "node2: node2"]
    assert cluster.login.run(["ssh", "node1", "exit 7"]).returncode == 7


def test_ssh_ignores_roots_settings_on_this_machine(cluster: Cluster) -> None:
    read = "cat ~/.bashrc ~/.ssh/* 2> /dev/null; printenv PATH"
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # Debian's sshd gives it to root
    assert cluster.login.run(["ssh", "node1", read]).stdout == f"{path}\n"


def test_hostfile_has_a_line_for_each_host(cluster: Cluster, tmp_path: Path) -> None:
    assert cluster.hostfile().read_text() == "node1 slots=2\nnode2 slots=2\n"
    path = cluster.hostfile(slots=1, hosts=cluster.hosts[1:], path=tmp_path / "one")
    assert path.read_text() == "node2 slots=1\n"


def test_commands_on_a_host_behave_like_local_ones(cluster: Cluster) -> None:
    node = cluster.hosts[0]
    assert node.run(["sh", "-c", "exit 3"]).returncode == 3
    assert node.run(["pwd"], cwd=cluster.shared).stdout == f"{cluster.shared}\n"
    assert node.run(["printenv", "WORD"], env={"WORD": "here"}).stdout == "here\n"
    sleep = node.popen(["sleep", "1000"])
    while not node.processes("^sleep 1000"):
        assert sleep.poll() is None
    assert [process.pid for process in node.processes("^sleep 1000")] == [sleep.pid]
    assert not cluster.hosts[1].processes("^sleep 1000")
    sleep.send_signal(signal.SIGSTOP)
    sleep.terminate()
    sleep.send_signal(signal.SIGCONT)
    assert sleep.wait(200) == -signal.SIGTERM
    with pytest.raises(subprocess.TimeoutExpired):
        node.run(["sleep", "1000"], timeout=0.2)
    assert not node.processes("^sleep 1000")


def test_shared_and_private_folders(cluster: Cluster) -> None:
    one, two = cluster.hosts
    for folder in (cluster.shared, cluster.local, Path("/dev/shm"), Path("/run")):
        one.run(["touch", folder / "seen"], check=True)
    seen = [two.run(["test", "-e", folder / "seen"]).returncode == 0 for folder in (cluster.shared, cluster.local)]
    assert seen == [True, False]
    assert two.run(["ls", "/dev/shm", "/run/seen"]).stdout == "/dev/shm:\n"
    assert not (cluster.local / "seen").exists()


def test_srun_runs_one_task_on_each_node(cluster: Cluster) -> None:
    done = cluster.login.run(["srun", "--nodes=2", "--ntasks-per-node=1", "hostname"])
    assert sorted(done.stdout.split()) == ["node1", "node2"]


def test_slurm_allocates_gpus(cluster: Cluster) -> None:
    ask = ["srun", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES"]
    assert cluster.login.run(ask).stdout.split() == ["0,1", "0,1"]
    assert cluster.login.run(["srun", "--nodes=1", "--gpus-per-node=3", "true"]).returncode != 0


def test_all_reduce_goes_over_the_link(cluster: Cluster) -> None:
    script = cluster.shared / "reduce.py"
    script.write_text(REDUCE)
    before = _received_bytes(cluster)
    done = cluster.login.run(["srun", "--nodes=2", "--ntasks-per-node=1", "python", script], timeout=120, check=True)
    assert sorted(done.stdout.splitlines()) == ["node1 [3.0]", "node2 [3.0]"]
    # In a ring of two ranks each sends half of the floats twice.
    assert all(after - first > 4 * FLOATS for first, after in zip(before, _received_bytes(cluster), strict=True))


def test_a_requeued_job_starts_again(cluster: Cluster) -> None:
    job = _submit_job_that_ends_after_restart(cluster)
    cluster.slurm.requeue(job)
    assert cluster.slurm.wait(job) == "COMPLETED"
    assert cluster.slurm.exit_code(job) == 0
    assert "restarts 1" in cluster.slurm.log(job)
    assert cluster.slurm.job(job)["Restarts"] == "1"


def test_a_job_survives_restarts_of_slurms_daemons(cluster: Cluster) -> None:
    job = _submit_job_that_ends_after_restart(cluster)
    cluster.slurm.restart_controller()
    for node in cluster.hosts:
        cluster.slurm.restart_daemon(node)
    assert cluster.slurm.state(job) == "RUNNING"
    cluster.slurm.cancel(job)
    assert cluster.slurm.wait(job) == "CANCELLED"
    assert "restarts 1" not in cluster.slurm.log(job)


def test_a_job_restarts_when_its_down_node_resumes(repaired: Cluster) -> None:
    slurm, node = repaired.slurm, repaired.hosts[1]
    job = _submit_job_that_ends_after_restart(repaired)
    slurm.down(node)
    slurm.wait(job, {"PENDING"})
    assert slurm.node_state(node).startswith("DOWN")
    slurm.resume(node)
    assert slurm.wait(job) == "COMPLETED"
    assert "restarts 1" in slurm.log(job)


def test_a_disconnected_host_keeps_running(repaired: Cluster) -> None:
    login, (one, two) = repaired.login, repaired.hosts
    one.wait_until_reaches(two)
    two.disconnect()
    assert not one.reaches(two)
    assert not login.reaches(two)
    login.wait_until_reaches(one)
    assert two.run(["hostname"]).stdout == "node2\n"
    two.reconnect()
    one.wait_until_reaches(two)
    login.wait_until_reaches(two)


def test_a_powered_off_host_runs_nothing_until_repaired(cluster: Cluster) -> None:
    node = cluster.hosts[0]
    left = node.popen(["sleep", "1000"])
    node.run(["touch", "/dev/shm/left"], check=True)
    cluster.slurm.drain(cluster.hosts[1])
    node.power_off()
    assert left.wait(200) == -signal.SIGKILL
    assert not node.processes()
    assert not cluster.login.reaches(node)
    cluster.repair()
    assert cluster.login.run(["ssh", node.name, "ls", "/dev/shm"]).stdout == ""
    done = cluster.login.run(["srun", "--nodes=2", "--ntasks-per-node=1", "hostname"])
    assert sorted(done.stdout.split()) == ["node1", "node2"]


@pytest.mark.parametrize("offset", [3600, -86400])
def test_processes_see_the_clock_offset(repaired: Cluster, offset: int) -> None:
    clock.set_offset(repaired.hosts[1], offset)
    show = ["python3", "-c", "import os, time; print(os.uname().nodename, time.time(), time.monotonic())"]
    for launch in (["srun", "--nodes=2", "--ntasks-per-node=1"], ["pdsh", "-N", "-w", "node1,node2"]):
        quoted = [f"'{word}'" if launch[0] == "pdsh" else word for word in show]
        lines = repaired.login.run([*launch, *quoted], check=True).stdout.splitlines()
        (_, wall, steady), (_, wall_off, steady_off) = sorted(line.split() for line in lines)
        assert float(wall_off) - float(wall) == pytest.approx(offset, abs=60)
        assert float(steady_off) - float(steady) == pytest.approx(0, abs=60)
    clock.clear_offset(repaired.hosts[1])
    now = repaired.login.run(["ssh", "node2", "date", "+%s"]).stdout
    assert float(now) == pytest.approx(float(repaired.login.run(["date", "+%s"]).stdout), abs=60)


def test_a_full_disk_on_one_host_only(cluster: Cluster, tmp_path: Path) -> None:
    one, two = cluster.hosts
    one.mount_tmpfs(tmp_path, "1M")
    write = ["dd", "if=/dev/zero", f"of={tmp_path}/file", "bs=1M", "count=2"]
    full = one.run(write)
    assert os.strerror(errno.ENOSPC) in full.stderr
    assert two.run(write).returncode == 0
    one.unmount(tmp_path)
    assert one.run(["stat", "--format=%s", tmp_path / "file"]).stdout == f"{2 << 20}\n"


def test_a_bind_mount_is_private_to_one_host(cluster: Cluster, tmp_path: Path) -> None:
    one, two = cluster.hosts
    files = [tmp_path / name for name in ("here", "there")]
    for path in files:
        path.write_text(path.name)
    one.bind(*files)
    assert [host.run(["cat", files[1]]).stdout for host in (one, two)] == ["here", "there"]
    one.unmount(files[1])


def test_a_cluster_of_three_has_three_hosts(cluster_of: Callable[[int], Cluster]) -> None:
    three = cluster_of(3)
    done = three.login.run(["srun", "--nodes=3", "--ntasks-per-node=1", "hostname"])
    assert sorted(done.stdout.split()) == ["node1", "node2", "node3"]
    assert cluster_of(3) is three


def _submit_job_that_ends_after_restart(cluster: Cluster) -> int:
    """Submits a job that sleeps until it is restarted; returns when it runs."""
    script = cluster.shared / "endless.sh"
    script.write_text(
        '#!/bin/sh\necho "restarts ${SLURM_RESTART_COUNT:-0}"\n[ "$SLURM_RESTART_COUNT" ] || sleep 1000\n'
    )
    job = cluster.slurm.sbatch(script, "--nodes=2", "--requeue", "--open-mode=append", cwd=cluster.shared)
    cluster.slurm.wait_for_log(job, "restarts 0")
    return job


def _received_bytes(cluster: Cluster) -> list[int]:
    """Bytes received by each host over its link."""
    counter = "/sys/class/net/eth0/statistics/rx_bytes"
    return [int(host.run(["cat", counter], check=True).stdout) for host in cluster.hosts]
