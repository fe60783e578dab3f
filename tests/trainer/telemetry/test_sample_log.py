"""The record of the samples that a run used."""

import resource
import time
from pathlib import Path

import pytest

from mixmae.base.run_directory import SAMPLES
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.telemetry.sample_log import SampleLog, read_samples
from tests.helpers import run_ranks

pytestmark = pytest.mark.distributed


def use(ranks: Ranks, run_dir: Path, starts: list[tuple[float, int, int, int]]) -> None:
    """Starts as (clock, first step, steps, offset): sample numbers say start, step and rank."""
    for clock, first, steps, offset in starts:
        time.time = lambda clock=clock: clock  # type: ignore[misc]
        log = SampleLog(run_dir, ranks)
        for step in range(first, first + steps):
            log.write(step, [[offset + 10 * step + ranks.rank], [offset + 10 * step + 5 + ranks.rank]])
        log.close()


def batch(step: int, offset: int = 0, ranks: int = 2) -> list[int]:
    return [offset + 10 * step + part + rank for rank in range(ranks) for part in (0, 5)]


def test_a_step_that_was_done_again_counts_once(tmp_path: Path) -> None:
    run_ranks(use, 2, tmp_path, [(100.0, 1, 5, 0), (200.0, 4, 3, 1000)])
    assert read_samples(tmp_path) == {step: batch(step, 1000 * (step > 3)) for step in range(1, 7)}


def test_the_last_time_is_the_last_also_where_the_clock_was_set_back(tmp_path: Path) -> None:
    run_ranks(use, 2, tmp_path, [(100.0, 1, 5, 0), (50.0, 4, 3, 1000), (10.0, 6, 2, 2000)])
    expected = {step: batch(step, 1000 * (step > 3) + 1000 * (step > 5)) for step in range(1, 8)}
    assert read_samples(tmp_path) == expected


def test_fewer_ranks_go_on_where_more_left_off(tmp_path: Path) -> None:
    run_ranks(use, 2, tmp_path, [(100.0, 1, 4, 0)])
    run_ranks(use, 1, tmp_path, [(50.0, 3, 3, 0)])
    expected = {step: batch(step, ranks=2 if step < 3 else 1) for step in range(1, 6)}
    assert read_samples(tmp_path) == expected


def test_a_line_that_a_killed_rank_left_is_passed_over(tmp_path: Path) -> None:
    run_ranks(use, 2, tmp_path, [(100.0, 1, 2, 0)])
    with (tmp_path / SAMPLES / "rank-00001.jsonl").open("a") as file:
        file.write('{"started": 100.0, "step": 3, "samp')
    run_ranks(use, 2, tmp_path, [(200.0, 3, 2, 0)])
    assert read_samples(tmp_path) == {step: batch(step) for step in range(1, 5)}


def use_with_a_full_disk(ranks: Ranks, run_dir: Path, until: int) -> str:
    """Files cannot grow between steps 10 and `until`: the system refuses, as it does on a full disk."""
    log = SampleLog(run_dir, ranks)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(1, 31):
        resource.setrlimit(resource.RLIMIT_FSIZE, (777 if 10 <= step < until else limits[0], limits[1]))
        log.write(step, [[10 * step + ranks.rank], [10 * step + 5 + ranks.rank]])
    try:
        log.close()
    except OSError as error:
        return str(error.strerror)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return ""


def test_a_full_disk_costs_nothing_once_there_is_room(tmp_path: Path) -> None:
    assert run_ranks(use_with_a_full_disk, 2, tmp_path, 20) == ["", ""]
    assert read_samples(tmp_path) == {step: batch(step) for step in range(1, 31)}


def test_what_could_not_be_written_in_the_end_is_told(tmp_path: Path) -> None:
    assert run_ranks(use_with_a_full_disk, 2, tmp_path, 99) == ["File too large"] * 2
    known = read_samples(tmp_path)
    assert list(known) == list(range(1, len(known) + 1))
    assert pytest.approx(10, abs=5) == len(known)
