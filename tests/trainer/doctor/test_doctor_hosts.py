"""The job on real hosts under srun, as one types it by hand: all well, and ill in many ways at once."""

import json
import sys
from pathlib import Path

import pytest

from mixmae.trainer.doctor.protocol.findings import Finding, Level, finding_of
from tests.cluster import clock
from tests.cluster.cluster import Cluster
from tests.trainer.doctor.recipes import write_recipe

pytestmark = pytest.mark.services


def examine(cluster: Cluster, recipe: Path, *argv: str, nodes: str = "--nodes=2", **env: str) -> list[Finding]:
    """What the doctor finds with two ranks on each node."""
    task = [sys.executable, "-m", "mixmae.trainer.doctor", str(recipe), "--jsonl", *argv]
    done = cluster.login.run(
        ["srun", *nodes.split(), "--ntasks-per-node=2", "--gpus-per-node=2", "--kill-on-bad-exit=1", *task],
        env={"OMP_NUM_THREADS": "1", **env},
        timeout=200,
    )
    found = [finding_of(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    assert found, done.stderr
    assert done.returncode == max(finding.level is Level.ERROR for finding in found), done.stderr
    return found


def test_two_nodes_that_are_well(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", cluster.shared / "run", shards)
    found = examine(cluster, recipe, "--world-size", "4", "--link", "1Mbps")
    assert {finding.level for finding in found} <= {Level.OK, Level.NOTE}
    by_check = {finding.check: finding for finding in found}
    assert by_check["ranks"].found == "4 arrived: 2 on node1, 2 on node2"
    assert by_check["run directory"].where == "all 2 hosts"
    assert by_check["ports"].found == "each host reaches the next one"
    assert "gloo over eth0" in by_check["all-reduce"].found
    assert not (cluster.shared / "run").exists()


def test_nodes_whose_own_names_are_their_loopback_addresses(repaired: Cluster, shards: Path, tmp_path: Path) -> None:
    """As Debian and Ubuntu write /etc/hosts; on node1 the main rank's address, too, is one that only others know."""
    for node in repaired.hosts:
        own = tmp_path / f"hosts-{node.name}"
        own.write_text(f"127.0.1.1 {node.name}\n" + (repaired.folder / "etc" / "hosts").read_text())
        node.bind(own, Path("/etc/hosts"))
    try:
        recipe = write_recipe(tmp_path / "recipe.yaml", repaired.shared / "run", shards)
        found = examine(repaired, recipe, "--world-size", "4", "--link", "1Mbps")
    finally:
        for node in repaired.hosts:
            node.unmount(Path("/etc/hosts"))
    assert {finding.level for finding in found} <= {Level.OK, Level.NOTE}, [finding.describe() for finding in found]
    assert "gloo over eth0" in {finding.check: finding for finding in found}["all-reduce"].found


def test_a_node_that_is_ill_in_many_ways(repaired: Cluster, shards: Path, tmp_path: Path) -> None:
    cluster, node1, node2 = repaired, *repaired.hosts
    run_dir, local = cluster.shared / "run", cluster.local
    run_dir.mkdir(exist_ok=True)
    for node in (node1, node2):
        node.run(["cp", "-r", shards, local / "shards"], check=True)
    removed = sorted(shards.glob("*.tar"))[-1].name
    node2.run(["rm", local / "shards" / removed], check=True)
    node2.run(["mkdir", "-p", local / "packages" / "timm-0.9.9.dist-info"], check=True)
    metadata = "Metadata-Version: 2.1\nName: timm\nVersion: 0.9.9\n"
    node2.run(["sh", "-c", f"printf '{metadata}' > {local}/packages/timm-0.9.9.dist-info/METADATA"], check=True)
    node2.mount_tmpfs(run_dir, "64M")
    clock.set_offset(node2, 3600.0)
    try:
        recipe = write_recipe(tmp_path / "recipe.yaml", run_dir, local / "shards")
        found = examine(cluster, recipe, PYTHONPATH=f"{local}/packages:{Path.cwd()}")
    finally:
        node2.unmount(run_dir)
        for node in (node1, node2):
            node.run(["rm", "-rf", local / "shards", local / "packages"], check=True)
    wrong = {finding.check: finding for finding in found if finding.level >= Level.WARNING and finding.where == "node2"}
    assert (wrong["clock"].level, wrong["clock"].found) == (Level.ERROR, "3600.0 s ahead of the main rank's host")
    assert (wrong["versions"].level, wrong["versions"].found) == (Level.WARNING, "timm 0.9.9")
    assert "does not show the main rank's files" in wrong["run directory"].found
    assert f"{removed} (missing)" in wrong["shards"].found
    assert all(finding.advice for finding in wrong.values())
    assert not [finding for finding in found if finding.level is Level.ERROR and finding.where != "node2"]


def test_a_full_disk(repaired: Cluster, shards: Path, tmp_path: Path) -> None:
    node1 = repaired.hosts[0]
    run_dir = repaired.shared / "small"
    run_dir.mkdir()
    node1.mount_tmpfs(run_dir, "8M")
    try:
        node1.run(["dd", "if=/dev/zero", f"of={run_dir}/filler", "bs=1M"])
        recipe = write_recipe(tmp_path / "recipe.yaml", run_dir, shards)
        found = examine(repaired, recipe, nodes="--nodes=1 --nodelist=node1")
    finally:
        node1.unmount(run_dir)
        run_dir.rmdir()
    wrong = {finding.check: finding for finding in found if finding.level is Level.ERROR}
    assert wrong.keys() == {"disk space", "writing", "recipe"}
    assert wrong["disk space"].where == wrong["writing"].where == "node1"
    assert wrong["writing"].found == f"{run_dir}: No space left on device"
