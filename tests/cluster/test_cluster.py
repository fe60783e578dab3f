"""The test cluster does what real ones do, and leaves nothing behind."""

import time

import pytest

from tests.cluster.cluster import Cluster

pytestmark = pytest.mark.services


def test_ssh_and_pdsh_reach_every_host_by_name(cluster: Cluster) -> None:
    for host in cluster.hosts:
        assert cluster.login.run(["ssh", host.name, "hostname"]).stdout == f"{host.name}\n"
        assert cluster.login.run(["ssh", host.address, "hostname"]).stdout == f"{host.name}\n"
    answers = cluster.login.run(["pdsh", "-S", "-w", "node1,node2", "hostname"])
    assert sorted(answers.stdout.splitlines()) == ["node1: node1", "node2: node2"]
    assert cluster.login.run(["ssh", "node1", "exit 7"]).returncode == 7


def test_srun_runs_one_task_on_each_node(cluster: Cluster) -> None:
    done = cluster.login.run(["srun", "--nodes=2", "--ntasks-per-node=1", "hostname"])
    assert sorted(done.stdout.split()) == ["node1", "node2"]


def test_slurm_gives_each_host_its_accelerators(cluster: Cluster) -> None:
    ask = ["srun", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES"]
    assert cluster.login.run(ask).stdout.split() == ["0,1", "0,1"]


def test_a_requeued_job_starts_again(cluster: Cluster) -> None:
    script = cluster.shared / "requeued.sh"
    script.write_text('#!/bin/sh\necho restarts ${SLURM_RESTART_COUNT:-0}\n[ "$SLURM_RESTART_COUNT" ] || sleep 100\n')
    job = cluster.slurm.sbatch(script, "--nodes=2", "--requeue", "--open-mode=append", cwd=cluster.shared)
    cluster.slurm.wait(job, {"RUNNING"})
    while "restarts 0" not in cluster.slurm.log(job):
        time.sleep(0.1)
    cluster.slurm.requeue(job)
    assert cluster.slurm.wait(job) == "COMPLETED"
    assert cluster.slurm.exit_code(job) == 0
    assert "restarts 1" in cluster.slurm.log(job)
    assert cluster.slurm.job(job)["Restarts"] == "1"
