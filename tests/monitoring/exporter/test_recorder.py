import math
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmae.monitoring.exporter.recorder import Recorder, Value, cumulative, is_known, read_ranks
from mixmae.monitoring.metrics import METRICS, STEP_BUCKETS, Kind, Source


def test_the_list_keeps_prometheus_naming() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.full_name.startswith("mixmae_")
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
        assert not metric.unit or metric.name.removesuffix("_total").endswith(metric.unit)
        assert metric.help[0].isupper()
        assert not metric.help.endswith(".")
        assert metric.kind is not Kind.HISTOGRAM or metric.source is not Source.NODE


def test_ranks_are_read_as_they_wrote(tmp_path: Path) -> None:
    recorders = [Recorder(tmp_path, rank) for rank in (0, 11)]
    for number, recorder in enumerate(recorders):
        recorder.set("step", 7 + number)
        recorder.add("images_total", 3)
        recorder.add("images_total", 4)
        recorder.set("replaced_samples_total", 2, "bad label")
    found = dict(read_ranks(tmp_path))
    assert list(found) == [0, 11]
    assert set(found[11]) == {
        Value("step", (), "", 8.0),
        Value("images_total", (), "", 7.0),
        Value("replaced_samples_total", ("bad label",), "", 2.0),
    }
    assert all(is_known(value) for value in found[11])
    assert not is_known(Value("of_another_version", (), "", 1.0))


@given(st.lists(st.floats(0, 1000), max_size=60))
@settings(max_examples=60, deadline=None)
def test_histograms_count_what_prometheus_counts(seconds: list[float]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(Path(folder), 0)
        for value in seconds:
            recorder.observe("step_seconds", value)
        parts = {value.part: value.value for _, values in read_ranks(Path(folder)) for value in values}
        recorder.close()
    buckets = dict(cumulative(parts))
    for bound in STEP_BUCKETS:
        assert buckets[str(bound)] == sum(value <= bound for value in seconds)
    assert buckets["+Inf"] == len(seconds)
    assert parts.get("sum", 0.0) == pytest.approx(math.fsum(seconds))


def test_a_process_that_starts_again_counts_from_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0)
    recorder.add("images_total", 5)
    again = Recorder(tmp_path, 0)
    assert dict(read_ranks(tmp_path)) == {0: []}
    again.add("images_total", 1)
    assert dict(read_ranks(tmp_path)) == {0: [Value("images_total", (), "", 1.0)]}


def _begin_for_ever(folder: Path) -> None:
    while True:
        Recorder(folder, 0).close()


def test_reading_while_ranks_begin_sees_whole_files(tmp_path: Path) -> None:
    writer = multiprocessing.get_context("spawn").Process(target=_begin_for_ever, args=(tmp_path,), daemon=True)
    writer.start()
    looks = 0
    while looks < 2000:
        looks += bool(list(read_ranks(tmp_path)))
    writer.kill()
    writer.join()


def _write_for_ever(folder: Path) -> None:
    recorder = Recorder(folder, 0)
    number = 0
    while True:
        number += 1
        recorder.set("step", number)
        recorder.observe("step_seconds", number % 7)
        recorder.set("replaced_samples_total", number, f"reason {number % 40}")


def test_reading_while_a_rank_writes_sees_whole_numbers(tmp_path: Path) -> None:
    writer = multiprocessing.get_context("spawn").Process(target=_write_for_ever, args=(tmp_path,), daemon=True)
    writer.start()
    seen = [0.0]
    while seen[-1] < 2000:
        for _, values in read_ranks(tmp_path):
            by_name = {value.metric: value.value for value in values if not value.part and not value.labels}
            seen.append(by_name.get("step", seen[-1]))
            assert all(value.value == int(value.value) for value in values)
    writer.kill()
    writer.join()
    assert seen == sorted(seen)


def test_no_room_is_found_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        Recorder(tmp_path, 0)
