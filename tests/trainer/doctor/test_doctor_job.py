"""`python -m mixmae.trainer.doctor` as launchers start it, with real ranks on this machine."""

import json
import os
import signal
from pathlib import Path

import pytest

from mixmae.base.ports import free_port
from mixmae.base.run_directory import newest_checkpoint
from mixmae.trainer.checkpoints.manifest import Manifest
from mixmae.trainer.doctor.checks.storage import checkpoint_bytes
from mixmae.trainer.doctor.cluster import Cluster
from mixmae.trainer.doctor.facts import HostFacts
from mixmae.trainer.doctor.message_store import MessageStore
from mixmae.trainer.doctor.probes.recipe import probe_recipe
from mixmae.trainer.doctor.protocol.findings import Finding, Level, finding_of
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.loading import load_recipe
from tests.trainer.doctor.recipes import write_recipe
from tests.warm import WarmProcess, run_module

pytestmark = pytest.mark.distributed

SECONDS = 120


@pytest.fixture
def recipe(tmp_path: Path, shards: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", shards)


def environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in place.items()}}


def start(
    argv: list[str],
    started: int = 2,
    world_size: int = 2,
    port: int | None = None,
    program: str = "mixmae.trainer.doctor",
) -> list[WarmProcess]:
    """Starts the first `started` ranks."""
    port = port or free_port()
    return [WarmProcess(program, *argv, env=environment(rank, world_size, port)) for rank in range(started)]


def finish(ranks: list[WarmProcess]) -> tuple[str, str, list[int | None]]:
    """What the main rank wrote, and all exit codes."""
    try:
        outputs = [rank.communicate(timeout=SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return *outputs[0], [rank.returncode for rank in ranks]


def findings_in(output: str) -> list[Finding]:
    return [finding_of(json.loads(line)) for line in output.splitlines()]


def test_two_healthy_ranks(recipe: Path, tmp_path: Path) -> None:
    output, errors, codes = finish(start([str(recipe), "--world-size", "2", "--jsonl"]))
    found = findings_in(output)
    assert codes == [0, 0], errors
    assert max(finding.level for finding in found) <= Level.NOTE
    assert {"ranks", "recipe", "versions", "memory", "run directory", "disk space", "writing", "shards", "samples",
            "all-reduce"} <= {finding.check for finding in found}  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_as_large_as_foretold(recipe: Path, tmp_path: Path) -> None:
    run_module("mixmae.trainer.train", str(recipe), "train.duration=3 steps", "monitoring.enabled=false")
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    content = load_recipe(recipe)
    cluster = Cluster(1, 1, (), (), content, probe_recipe(content, Ranks()))
    assert cluster.recipe_facts is not None
    assert cluster.recipe_facts.checkpoints == 1
    foretold = checkpoint_bytes(cluster)
    assert foretold is not None
    assert 0.9 * foretold < Manifest.read(newest).bytes <= foretold


def test_the_table_and_a_link_that_is_too_slow(recipe: Path) -> None:
    output, errors, codes = finish(start([str(recipe), "--short", "--link", "900tbps"]))
    assert codes == [0, 0], errors
    lines = output.splitlines()
    assert lines[1].startswith("warning  all-reduce")
    assert "slowest pair: rank 0 - rank 1" in lines[1]
    assert lines[-1].startswith("ready: 0 errors, 1 warning")


def test_hosts_and_network_without_a_recipe() -> None:
    output, errors, codes = finish(start(["--jsonl", "--short"]))
    assert codes == [0, 0], errors
    checks = {finding.check for finding in findings_in(output)}
    assert {"ranks", "all-reduce", "versions"} <= checks
    assert {"recipe", "shards", "run directory"}.isdisjoint(checks)


def test_fewer_ranks_than_asked_and_a_recipe_that_does_not_fit(recipe: Path) -> None:
    output, _, codes = finish(start([str(recipe), "--jsonl", "--world-size", "4", "train.micro_batch=3"]))
    assert codes == [1, 0]
    wrong = {finding.check: finding for finding in findings_in(output) if finding.level is Level.ERROR}
    assert wrong.keys() == {"ranks", "recipe"}
    assert (wrong["ranks"].found, wrong["ranks"].expected) == ("2 started", "4")
    assert "does not divide" in wrong["recipe"].found


def test_a_launcher_that_ends_all_ranks_is_told_who_is_missing(recipe: Path) -> None:
    port = free_port()
    (main,) = start([str(recipe), "--jsonl"], started=1, port=port)
    here = MessageStore(Ranks(1, 2, 1, "127.0.0.1", port))
    here.receive("host/0", HostFacts, SECONDS)  # the main rank itself has arrived
    main.send_signal(signal.SIGTERM)
    output, errors, codes = finish([main])
    assert codes == [1], errors
    wrong = [finding.found for finding in findings_in(output) if finding.level is Level.ERROR]
    assert wrong == ["1 of 2 did not report: 1", "terminated by the launcher"]


def test_a_network_that_never_answers_is_told_in_time(recipe: Path, tmp_path: Path) -> None:
    script = tmp_path / "stuck.py"
    script.write_text(
        "import os, sys, time\n"
        "from mixmae.trainer.engine import distributed\n"
        "from mixmae.trainer.doctor import follower, main_rank, __main__\n"
        "main_rank.MEASURING_SECONDS = 5.0\n"
        "if os.environ['RANK'] == '1':\n"
        "    follower.measure = lambda *_: time.sleep(600)\n"
        "distributed.leave(__main__.main(sys.argv[1:]))\n"
    )
    output, errors = output_of_main(start([str(recipe), "--jsonl"], program=str(script)))
    wrong = [finding for finding in findings_in(output) if finding.level is Level.ERROR]
    assert [(finding.check, finding.found) for finding in wrong] == [("all-reduce", "gloo: no result within 5 s")], (
        errors
    )


def test_a_host_that_stops_answering_is_named(recipe: Path, tmp_path: Path) -> None:
    script = tmp_path / "silent.py"
    script.write_text(
        "import os, sys, time\n"
        "os.environ['LOCAL_RANK'] = '0'\n"
        "from mixmae.trainer.engine import distributed\n"
        "from mixmae.trainer.doctor import follower, main_rank, __main__\n"
        "main_rank._PROBING_SECONDS = 5.0\n"
        "if os.environ['RANK'] == '1':\n"
        "    follower.probe_host = lambda *_: time.sleep(600)\n"
        "distributed.leave(__main__.main(sys.argv[1:]))\n"
    )
    output, errors = output_of_main(start([str(recipe), "--jsonl"], program=str(script)))
    wrong = [finding for finding in findings_in(output) if finding.level is Level.ERROR]
    assert ("host", "stopped responding during the checks") in [(one.check, one.found) for one in wrong], errors
    assert "all-reduce" not in {finding.check for finding in findings_in(output)}


def output_of_main(ranks: list[WarmProcess]) -> tuple[str, str]:
    """What the main rank wrote; the others, which may hang, are killed."""
    try:
        output, errors = ranks[0].communicate(timeout=SECONDS)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == 1, errors
    return output, errors


def test_a_main_rank_that_cannot_be_reached(tmp_path: Path) -> None:
    script = tmp_path / "alone.py"
    script.write_text(
        "import sys\n"
        "from mixmae.base.errors import run_cli\n"
        "from mixmae.trainer.doctor import message_store, __main__\n"
        "message_store.ARRIVAL_SECONDS = 2.0\n"
        "sys.exit(run_cli(__main__.main, []))\n"
    )
    rank = WarmProcess(str(script), env=environment(1, 2, free_port()))
    _, errors = rank.communicate(SECONDS)
    assert rank.returncode == 1
    assert "rank 1: cannot reach the main rank at 127.0.0.1 port" in errors.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.yaml"], "does not exist"),
        (["configs/pretrain/demo.yaml", "train.zero=1"], "did you mean"),
        (["--link", "fast"], "expected bits or bytes per second"),
        (["--world-size", "0"], "1 or more"),
    ],
)
def test_mistakes_in_the_command(argv: list[str], message: str) -> None:
    _, errors, codes = finish(start(argv, started=1, world_size=1))
    assert codes == [2]
    assert message in errors
    assert "Traceback" not in errors
