"""Lists of nodes are read as scontrol reads them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mixmae.base.hostlist import expand
from mixmae.base.rank_env import read_rank_env
from tests.helpers import lacks

LISTS = {
    "node1": ["node1"],
    "node1,node2": ["node1", "node2"],
    "node[01-03,7],login": ["node01", "node02", "node03", "node7", "login"],
    "gpu-[8-11]": ["gpu-8", "gpu-9", "gpu-10", "gpu-11"],
    "rack[0-1]node[2-3]": ["rack0node2", "rack0node3", "rack1node2", "rack1node3"],
    "b[2],a[1]": ["b2", "a1"],
}


@pytest.mark.parametrize(("hosts", "names"), LISTS.items())
def test_names_of_a_list(hosts: str, names: list[str]) -> None:
    assert expand(hosts) == names


@pytest.mark.services
@pytest.mark.parametrize("hosts", LISTS)
def test_scontrol_reads_the_same(hosts: str, tmp_path: Path) -> None:
    if shutil.which("scontrol") is None:
        lacks("needs the program scontrol: apt-get install slurm-client")
    (tmp_path / "slurm.conf").write_text("ClusterName=c\nSlurmctldHost=localhost\nNodeName=localhost\n")
    done = subprocess.run(
        ["scontrol", "show", "hostnames", hosts],
        env={**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == expand(hosts)


@pytest.mark.parametrize("hosts", ["", "node[", "node[a-b]", "node[3-1]", "node]1", "a,,b", "node[1-99999999999]"])
def test_other_text_is_refused(hosts: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        expand(hosts)


def test_a_step_of_srun_meets_at_its_first_node() -> None:
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "7",
    }
    assert read_rank_env({**step, "SLURM_STEP_NODELIST": "node[07-08]"}).master_addr == "node07"
    assert read_rank_env({**step, "SLURM_JOB_NODELIST": "a,b", "MASTER_ADDR": "c"}).master_addr == "c"
