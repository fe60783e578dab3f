"""The seeded choice of faults, and the environment that runs inherit."""

import os
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.drill.faults import BACKENDS, all_faults, draw
from tests.warm import WarmProcess

PAIRS = sum(len(fault.backends) for fault in all_faults())


@given(st.integers(0, 2**32), st.integers(1, 2 * PAIRS), st.sets(st.sampled_from(list(BACKENDS)), min_size=1))
def test_no_fault_repeats_before_all_were_drawn(seed: int, count: int, backends: set[str]) -> None:
    drawn = draw(random.Random(seed), count, sorted(backends))
    possible = [(fault, backend) for fault in all_faults() for backend in fault.backends if backend in backends]
    assert len(drawn) == count
    assert {backend for _, backend in drawn} <= backends
    times = Counter(drawn)
    assert max(times.values()) - min(times[pair] for pair in possible) <= 1
    faults = {fault for fault, _ in possible}
    assert {fault for fault, _ in drawn} == faults or count < len(faults)


def test_the_choice_depends_on_the_seed_alone() -> None:
    first, again, other = (draw(random.Random(seed), 50, list(BACKENDS)) for seed in (7, 7, 8))
    assert first == again != other


def test_names_and_descriptions_of_faults_are_unique() -> None:
    assert (
        len({fault.name for fault in all_faults()})
        == len({fault.description for fault in all_faults()})
        == len(all_faults())
    )
    assert PAIRS >= 50


def test_the_choice_can_be_limited_to_some_faults() -> None:
    drawn = draw(random.Random(0), 4, ["local"], ["killed_rank", "flipped_bit"])
    assert Counter(fault.name for fault, _ in drawn) == {"killed_rank": 2, "flipped_bit": 2}


@pytest.mark.distributed
def test_runs_of_a_drill_under_nohup_receive_sighup(tmp_path: Path) -> None:
    child = "import signal; print(signal.getsignal(signal.SIGHUP) == signal.SIG_DFL)"
    drill = tmp_path / "drill.py"
    drill.write_text(f"""
import signal, subprocess, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from tests.drill.runs import clean_environment
clean_environment()
signal.raise_signal(signal.SIGHUP)
subprocess.run([sys.executable, "-c", {child!r}], check=True)
""")
    assert WarmProcess(str(drill), env=os.environ).communicate()[0] == "True\n"
