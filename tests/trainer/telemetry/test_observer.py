"""A run and its exporter: what is told, what it costs, and that losing it costs nothing."""

import json
import math
import os
import signal
import time
import urllib.request
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mixmae.base.errors import UsageError
from mixmae.base.phases import PHASES
from mixmae.base.run_directory import targets_folder
from mixmae.models import MixMAE
from mixmae.monitoring.metrics import BY_NAME, ENDS, PREFIX, Source
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run.checking import check
from mixmae.trainer.run.ending import close
from mixmae.trainer.run.loop import fit
from mixmae.trainer.run.preparing import prepare
from mixmae.trainer.tasks.flops import model_flops
from mixmae.trainer.tasks.registry import build_model
from mixmae.trainer.telemetry.clock import StepClock
from mixmae.trainer.telemetry.events import Events, begin_attempt, past_ends, read_events, refuse_attempt, restarted
from mixmae.trainer.telemetry.observer import Observer, start_observer
from tests.helpers import run_ranks, tiny_recipe
from tests.trainer.data.servers import http_server


def recipe_for(shards: Path, run_dir: Path, **changes: Any) -> Recipe:
    settings = {"data.shards": str(shards), "run_dir": str(run_dir), "train.precision": "bf16"}
    return tiny_recipe(**{**settings, "monitoring.port": 0, "monitoring.peak_flops": 1e12, **changes})


def scrape(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """What a run's exporter says now: samples by metric."""
    deadline = time.monotonic() + 60
    while not (files := list(targets_folder(run_dir).glob("*.json"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (target,) = json.loads(files[0].read_text())[0]["targets"]
    text = urllib.request.urlopen(f"http://{target}/metrics", timeout=10).read().decode()
    return {
        family.name: [{**sample.labels, "name": sample.name, "value": sample.value} for sample in family.samples]
        for family in text_string_to_metric_families(text)
    }


def train_and_scrape(ranks: Ranks, recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    """Trains to the end; returns what the exporter said before it ended."""
    run = prepare(check(recipe, ranks), ranks)
    fit(run)
    if ranks.is_main:
        run.observer.evaluation({"top1": 0.25, "loss": math.nan})
    torch.distributed.barrier()
    found = scrape(recipe.run_dir) if ranks.is_main else {}
    torch.distributed.barrier()
    close(run, clean=True)
    torch.distributed.barrier()
    assert run.observer.shared is not None
    assert not run.observer.shared.exists()
    return found


@pytest.fixture(scope="module")
def scraped(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    run_dir = tmp_path_factory.mktemp("observed") / "run"
    recipe = recipe_for(shards, run_dir, **{"checkpoint.every": "4 steps", "monitoring.comms_logger": True})
    found: dict[str, list[dict[str, Any]]] = run_ranks(train_and_scrape, 2, recipe)[0]
    assert not list(targets_folder(run_dir).glob("*.json"))
    return found


def value(found: dict[str, list[dict[str, Any]]], name: str, **labels: str) -> float:
    told = [sample for family in found.values() for sample in family if sample["name"] == PREFIX + name]
    (sample,) = [sample for sample in told if labels.items() <= sample.items()]
    return float(sample["value"])


@pytest.mark.distributed
def test_all_that_a_cpu_run_can_tell_is_told(scraped: dict[str, list[dict[str, Any]]]) -> None:
    told = {name.removeprefix(PREFIX) for name in scraped}
    expected = {name.removesuffix("_total") for name in BY_NAME}
    only_on_gpus = {name for name in expected if name.startswith(("gpu_", "device_memory_"))}
    only_when_it_happens = {"replaced_samples"}
    assert told == expected - only_on_gpus - only_when_it_happens


@pytest.mark.distributed
def test_ranks_tell_their_own_and_the_main_one_the_runs(scraped: dict[str, list[dict[str, Any]]]) -> None:
    for metric in BY_NAME.values():
        samples = scraped.get(PREFIX + metric.name.removesuffix("_total"), [])
        if samples and metric.source is Source.RANK:
            assert {sample["rank"] for sample in samples} == {"0", "1"}, metric
        elif metric.source is Source.MAIN:
            assert not any("rank" in sample for sample in samples), metric


@pytest.mark.distributed
def test_numbers_are_those_of_the_run(scraped: dict[str, list[dict[str, Any]]]) -> None:
    assert value(scraped, "step", rank="1") == value(scraped, "target_steps") == 8
    assert value(scraped, "images_total", rank="0") == 32
    assert value(scraped, "epoch") == pytest.approx(64 / 54)
    assert value(scraped, "step_seconds_count", rank="0") == 7
    assert value(scraped, "step_part_seconds_count", rank="1", part="forward") == 8
    assert value(scraped, "checkpoint_seconds_count") == 2
    assert 0 < value(scraped, "loss") < 10
    assert value(scraped, "mfu_ratio") == pytest.approx(value(scraped, "model_flops_per_second") / 2e12)
    assert time.time() - 300 < value(scraped, "heartbeat_timestamp_seconds", rank="1") <= time.time()
    assert value(scraped, "communication_bytes_total", rank="0", operation="all_reduce") > 0
    assert 0 < value(scraped, "communication_seconds_total", rank="0", operation="all_reduce") < 60
    assert value(scraped, "world_size") == 2
    assert value(scraped, "skipped_steps_total") == 0
    assert value(scraped, "evaluation", metric="top1") == 0.25
    assert math.isnan(value(scraped, "evaluation", metric="loss"))


@pytest.mark.distributed
@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_tell_where_they_are(scraped: dict[str, list[dict[str, Any]]], rank: str) -> None:
    accumulated, logged, saved = 4 * 2, 1, 2
    assert value(scraped, "parts_total", rank=rank) == 8 * (accumulated + logged) + saved
    phases = {phase: value(scraped, "rank_part", rank=rank, part=phase) for phase in PHASES}
    assert phases == {phase: float(phase == "ending") for phase in PHASES}
    assert time.time() - 300 < value(scraped, "alive_timestamp_seconds", rank=rank) <= time.time()


def test_flops_are_those_of_a_real_pass() -> None:
    """Of one in which all tokens of a window see each other; keeping the groups apart makes the model no smaller."""
    recipe = tiny_recipe()
    model = build_model(recipe)
    counts = []
    assert isinstance(model, MixMAE)
    for model.separate_groups in (False, True):
        # By products: torch 2.11 counts none in its attention of CPUs.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.randn(2, 3, 64, 64), torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0, 1], [1, 0]]))
        counts.append(counter.get_total_flops())
    assert model_flops(recipe) == 3 * counts[0] / 2 > 3 * counts[1] / 2


READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
WAITS = ("torch.cuda.synchronize", "torch.cuda.Event.synchronize", "torch.cuda.Stream.synchronize")


class CountReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: reads of a tensor's value, and copies that end on the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in READS or (func in COPIES and result.device.type == "cpu"):
            self.seen[str(func)] += 1
        return result


def reads_of_a_run(ranks: Ranks, recipes: list[Recipe]) -> list[Counter[str]]:
    counts = []
    for recipe in recipes:
        run = prepare(check(recipe, ranks), ranks)
        with ExitStack() as stack:
            if not recipe.monitoring.enabled:  # what an observer without a recorder does is left out too
                for verb in ("set_phase", "data", "process", "logged", "checkpoint", "step"):
                    stack.enter_context(mock.patch.object(Observer, verb))
                stack.enter_context(mock.patch.object(StepClock, "phase", return_value=nullcontext()))
            waits = {name: stack.enter_context(mock.patch(name)) for name in WAITS}
            counter = stack.enter_context(CountReads())
            fit(run)
        counts.append(counter.seen + Counter({name: wait.call_count for name, wait in waits.items()}))
        close(run, clean=True)
    return counts


def test_observing_adds_no_read_of_the_device(shards: Path, tmp_path: Path) -> None:
    recipes = []
    for enabled in (False, True):
        changes = {"monitoring.enabled": enabled, "log.every": 4}
        recipes.append(recipe_for(shards, tmp_path / f"observed-{enabled}", **changes))
    unobserved, observed = run_ranks(reads_of_a_run, 1, recipes)[0]
    assert {"aten._local_scalar_dense.default", "aten.copy_.default"} <= set(unobserved)  # they are counted at all
    assert observed == unobserved


def fit_without_exporter(ranks: Ranks, recipes: dict[signal.Signals, Recipe]) -> list[tuple[int, bool]]:
    """Of runs whose exporter gets a signal: the steps that they come to, and whether it is there after them."""
    ends = []
    for number, recipe in recipes.items():
        run = prepare(check(recipe, ranks), ranks)
        exporter = run.observer.exporter
        assert exporter is not None
        pid = exporter.pid
        scrape(recipe.run_dir)
        os.kill(pid, number)
        fit(run)
        close(run, clean=True)
        ends.append((run.state.step, psutil.pid_exists(pid)))
    return ends


def test_a_run_goes_on_without_its_exporter_and_leaves_none_that_hangs(shards: Path, tmp_path: Path) -> None:
    recipes = {number: recipe_for(shards, tmp_path / number.name) for number in (signal.SIGKILL, signal.SIGSTOP)}
    assert run_ranks(fit_without_exporter, 1, recipes) == [[(8, False), (8, False)]]


def observe_without_memory(ranks: Ranks, recipe: Recipe) -> str | None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    os.posix_fallocate = full
    observer, silent = start_observer(recipe, ranks)
    observer.process()
    observer.close(clean=True)
    return silent


def test_a_run_goes_on_without_room_for_its_numbers(shards: Path, tmp_path: Path) -> None:
    (silent,) = run_ranks(observe_without_memory, 1, recipe_for(shards, tmp_path / "run"))
    assert "no metrics are exported" in str(silent)
    assert "No space left" in str(silent)


@pytest.mark.distributed
def test_blocks_of_remote_shards_are_counted(shards: Path, tmp_path: Path) -> None:
    with http_server(shards) as server:
        changes = {"data.shards": server.url, "data.cache.dir": str(tmp_path / "cache"), "data.num_workers": 2}
        found = run_ranks(train_and_scrape, 2, recipe_for(shards, tmp_path / "run", **changes))
        fetched = sum(value(found[0], "cache_blocks_total", rank=rank, result="fetched") for rank in "01")
        in_cache = sum(value(found[0], "cache_blocks_total", rank=rank, result="found") for rank in "01")
        asked = {path for path, span in server.requests if path.endswith(".tar") and span is not None}
    assert 0 < fetched <= len(asked)  # each of the small shards is one block; what was read ahead is not counted yet
    assert in_cache + fetched >= 64  # the samples of eight steps


def train_again_and_scrape(ranks: Ranks, recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    train_and_scrape(ranks, recipe)
    (recipe.run_dir / "checkpoints" / "newest").write_text("step-00000004\n")
    return train_and_scrape(ranks, recipe)


def test_restarts_are_counted_by_how_the_attempt_before_ended(shards: Path, tmp_path: Path) -> None:
    recipe = recipe_for(shards, tmp_path / "run", **{"checkpoint.every": "4 steps"})
    found = run_ranks(train_again_and_scrape, 1, recipe)[0]
    assert value(found, "resumes_total", reason="killed") == 1
    assert value(found, "resumes_total", reason="failed") == 0
    (event,) = read_events(recipe.run_dir, "resumed")
    assert (event["step"], event["reason"]) == (4, "killed")


def test_the_record_says_how_attempts_ended(tmp_path: Path) -> None:
    expected: list[str] = []
    attempts = {
        "preempted": ["checkpoint", "preempted", "checkpoint"],
        "failed": ["failed"],
        "killed": [],
        "finished": ["end"],
    }
    assert set(attempts) == set(ENDS)
    for end, record in [*attempts.items(), *attempts.items()]:
        assert begin_attempt(tmp_path / "run") == expected
        events = Events(tmp_path / "run")
        for event in ["start", "step", *record]:
            events.write(event, step=0)
        events.close()
        expected.append(end)
    begin_attempt(tmp_path / "run")
    refuse_attempt(tmp_path / "run", "another seed")
    assert past_ends(tmp_path / "run") == expected
    assert restarted(expected, {}) == {"reason": "finished"}
    assert restarted([], {"SLURM_RESTART_COUNT": "0"}) == {"slurm_restart_count": 0}
    assert restarted(["preempted"], {"SLURM_RESTART_COUNT": "3"}) == {"reason": "preempted", "slurm_restart_count": 3}


def refused_when_built(ranks: Ranks, recipe: Recipe) -> tuple[list[Path], bool, list[str]]:
    def refuse(*_: Any) -> None:
        raise UsageError("no")

    def start(*given: Any) -> tuple[Observer, str | None]:
        started.append(start_observer(*given))
        return started[0]

    started: list[tuple[Observer, str | None]] = []
    job = check(recipe, ranks)
    with (
        mock.patch("mixmae.trainer.run.preparing.build_engine", refuse),
        mock.patch("mixmae.trainer.run.preparing.start_observer", start),
        pytest.raises(UsageError, match="no"),
    ):
        prepare(job, ranks)
    shared = started[0][0].shared
    assert shared is not None
    left = list(targets_folder(recipe.run_dir).glob("*.json"))
    return left, shared.exists(), past_ends(recipe.run_dir)


def test_a_start_that_is_refused_leaves_nothing_to_be_missed(shards: Path, tmp_path: Path) -> None:
    ((targets, shared, ends),) = run_ranks(refused_when_built, 1, recipe_for(shards, tmp_path / "run"))
    assert targets == []
    assert not shared
    assert ends == []
