"""What is gathered is true of this machine; what it lacks (GPUs, InfiniBand) is shown to be read from fakes."""

import argparse
import importlib.metadata
import os
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.doctor.facts import Plan
from mixmae.trainer.doctor.probes.bandwidth import turns
from mixmae.trainer.doctor.probes.gpus import read_gpus
from mixmae.trainer.doctor.probes.host import host_facts, rank_facts
from mixmae.trainer.doctor.probes.network import (
    Listener,
    fabric_rate,
    interface_with,
    is_free,
    why_unreachable,
)
from mixmae.trainer.doctor.probes.recipe import probe_recipe
from mixmae.trainer.doctor.probes.run_dir import arrived, probe_folder, probe_run_dir
from mixmae.trainer.doctor.probes.shards import first_and_last, probe_shards
from mixmae.trainer.doctor.probes.versions import fingerprint_of, relevant
from mixmae.trainer.doctor.protocol.link import link_rate
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.engine.interfaces import address_towards
from tests.helpers import tiny_recipe


def test_a_rank_and_its_host_are_described() -> None:
    ranks = Ranks(0, 1, 0, "127.0.0.1", 0)
    rank = rank_facts(ranks)
    assert rank.cores.bit_count() == len(os.sched_getaffinity(0))
    assert rank.host == socket.gethostname()
    host = host_facts(ranks, None, ("127.0.0.1", 1))
    assert host.memory == psutil.virtual_memory().total
    assert host.versions["torch"] == importlib.metadata.version("torch")
    assert len(host.versions["mixmae's sources"]) == 12
    assert host.interface is not None
    assert host.interface.name == "lo"
    assert host.exporter_port_free is None


def test_sources_have_one_fingerprint_wherever_they_lie(tmp_path: Path) -> None:
    for checkout in ("a", "b"):
        (tmp_path / checkout / "trainer").mkdir(parents=True)
        (tmp_path / checkout / "trainer" / "loop.py").write_text("x = 1\n")
    a, b = (fingerprint_of([tmp_path / checkout / "trainer"]) for checkout in ("a", "b"))
    assert a == b
    (tmp_path / "b" / "trainer" / "loop.py").write_text("x = 2\n")
    assert fingerprint_of([tmp_path / "b" / "trainer"]) != a


def test_only_variables_that_matter_are_told() -> None:
    told = relevant(
        {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1", "AWS_SECRET_ACCESS_KEY": "x", "CUDA_VISIBLE_DEVICES": "3"}
    )
    assert told == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1"}


def test_ports_and_interfaces() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_with("203.0.113.7") is None
    with Listener("127.0.0.1") as listener:
        assert why_unreachable(*listener.at) == ""
        assert not is_free(listener.at[1])
    assert "refused" in why_unreachable(*listener.at)
    assert is_free(listener.at[1])


def test_infiniband_rates_add_up_over_active_ports(tmp_path: Path) -> None:
    assert fabric_rate(tmp_path) is None
    for card, state, rate in (("mlx5_0", "4: ACTIVE", "200 Gb/sec (4X HDR)"), ("mlx5_1", "4: ACTIVE", "200 Gb/sec"),
                              ("mlx5_2", "1: DOWN", "10 Gb/sec (4X SDR)")):  # fmt: skip
        port = tmp_path / card / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state + "\n")
        (port / "rate").write_text(rate + "\n")
    assert fabric_rate(tmp_path) == 50e9


@pytest.mark.parametrize(
    ("text", "rate"),
    [("200gbps", 25e9), ("200 Gbit/s", 25e9), ("25GB/s", 25e9), ("100Mbps", 12.5e6), ("1.6tbps", 2e11)],
)
def test_link_speeds(text: str, rate: float) -> None:
    assert link_rate(text) == rate


@pytest.mark.parametrize("text", ["200", "fast", "200g", "0gbps", "-1gbps", "25gB"])
def test_what_is_no_link_speed(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="200gbps"):
        link_rate(text)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=40, unique=True))
def test_neighbours_of_a_ring_take_turns(members: list[int]) -> None:
    expected = {frozenset(pair) for pair in zip(members, [*members[1:], members[0]], strict=True)}
    groups = turns(members)
    assert {frozenset(pair) for group in groups for pair in group} == expected
    assert sum(map(len, groups)) == len(expected)
    assert len(groups) <= 3
    for group in groups:
        named = [rank for pair in group for rank in pair]
        assert len(named) == len(set(named))


def test_hosts_know_their_neighbours() -> None:
    plan = Plan(((0, "a", "x", 1), (4, "b", "y", 2), (8, "c", "z", 3)), None, "")
    assert [plan.next_to(rank) for rank in (0, 4, 8)] == [("b", "y", 2), ("c", "z", 3), ("a", "x", 1)]
    assert Plan(((0, "a", "x", 1),), None, "").next_to(0) is None


def test_a_probe_leaves_a_run_directory_as_it_was(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "photos"
    with probe_folder(run_dir) as (folder, token):
        facts = probe_run_dir(run_dir, folder, token, 3, 1 << 20)
        assert arrived(folder, 3)
    assert (facts.saw, facts.problem, facts.wrote, facts.resolved) == (True, "", 1 << 20, str(run_dir))
    assert facts.seconds > 0
    assert abs(facts.free - shutil.disk_usage(tmp_path).free) < 1 << 30
    assert list(tmp_path.iterdir()) == []
    run_dir.mkdir(parents=True)
    with probe_folder(run_dir):
        pass
    assert list(run_dir.iterdir()) == []


def test_another_directory_under_the_same_name_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixmae.trainer.doctor.probes.run_dir._CACHING", 0.0)
    with probe_folder(tmp_path) as (folder, token):
        assert not probe_run_dir(tmp_path, folder, "another token", 0, 1 << 20).saw
        assert not probe_run_dir(tmp_path, tmp_path / ".doctor-elsewhere", token, 0, 1 << 20).saw
        assert not arrived(folder, 0)


def test_shards_are_read_as_a_run_reads_them(shards: Path) -> None:
    facts = probe_shards(tiny_recipe(**{"data.shards": str(shards)}), 60.0)
    index = open_index(shards)
    assert (facts.fingerprint, facts.images, facts.refused) == (index.fingerprint, len(index), "")
    assert facts.tried == len(set(first_and_last(index))) > 2
    assert facts.unreadable == ()
    assert facts.read == sum(len(index.read(sample)) for sample in first_and_last(index))


def test_first_and_last_samples_of_shards(shards: Path) -> None:
    index = open_index(shards)
    of_shard = index.samples["shard"]
    ends = {s for n in range(len(index.shards)) for s in ((of_shard == n).argmax(), (of_shard <= n).sum() - 1)}
    found = set(first_and_last(index))
    assert found <= ends
    assert {0, len(index) - 1} <= found


def test_what_is_wrong_with_shards_is_said(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    recipe = tiny_recipe(**{"data.shards": str(copy)})
    index = open_index(copy)
    first = copy / index.shards[0].name
    content = bytearray(first.read_bytes())
    content[int(index.samples[0]["offset"])] ^= 0xFF
    first.write_bytes(content)
    (unreadable,) = probe_shards(recipe, 60.0).unreadable
    assert first.name in unreadable
    assert "other bytes" in unreadable
    (copy / index.shards[-1].name).unlink()
    assert f"{index.shards[-1].name} (missing)" in probe_shards(recipe, 60.0).refused
    shutil.rmtree(copy)
    assert "does not exist" in probe_shards(recipe, 60.0).refused


def test_reading_shards_ends_in_time(shards: Path) -> None:
    assert probe_shards(tiny_recipe(**{"data.shards": str(shards)}), 0.0).tried == 1


def test_a_recipe_is_held_against_what_training_refuses(shards: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(**{"data.shards": str(shards), "run_dir": tmp_path / "run"})
    good = probe_recipe(recipe, Ranks())
    assert good.refused == ""
    assert good.parameters
    refused = probe_recipe(recipe, Ranks(world_size=3)).refused
    assert "does not divide" in refused
    bad = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"name": "swin"})})
    assert probe_recipe(bad, Ranks()).parameters is None


class FakeNvmlError(Exception):
    pass


def fake_nvml(**changes: Any) -> SimpleNamespace:
    """NVML as it answers for one A100 of two NVLinks."""

    def link_state(_: object, link: int) -> int:
        if link > 3:
            raise FakeNvmlError
        return int(link < 2)

    answers = {
        "NVMLError": FakeNvmlError,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlSystemGetDriverVersion": lambda: "550.54.15",
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=80 << 30, free=70 << 30),
        "nvmlDeviceGetUUID": lambda _: "GPU-1",
        "nvmlDeviceGetName": lambda _: "NVIDIA A100-SXM4-80GB",
        "nvmlDeviceGetComputeRunningProcesses": lambda _: [SimpleNamespace(pid=4711)],
        "nvmlDeviceGetTotalEccErrors": lambda _, kind, counter: 2 if (kind, counter) == (1, 0) else 0,
        "NVML_MEMORY_ERROR_TYPE_UNCORRECTED": 1,
        "NVML_VOLATILE_ECC": 0,
        "nvmlDeviceGetRemappedRows": lambda _: (0, 1, 1, 0),
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda _: 0x40 | 0x1,
        "nvmlClocksThrottleReasonHwThermalSlowdown": 0x40,
        "nvmlClocksThrottleReasonSwThermalSlowdown": 0x20,
        "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": 0x80,
        "nvmlClocksThrottleReasonHwSlowdown": 0x8,
        "NVML_CLOCK_SM": 1,
        "nvmlDeviceGetMaxClockInfo": lambda _, clock: 1410 if clock == 1 else 0,
        "nvmlDeviceGetCurrPcieLinkWidth": lambda _: 8,
        "nvmlDeviceGetMaxPcieLinkWidth": lambda _: 16,
        "nvmlDeviceGetMaxPcieLinkGeneration": lambda _: 4,
        "nvmlDeviceGetNvLinkState": link_state,
        "NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON": 90,
        "nvmlDeviceGetFieldValues": lambda _, fields: [
            SimpleNamespace(nvmlReturn=int(fields != [90]), value=SimpleNamespace(uiVal=25000))
        ],
    }
    return SimpleNamespace(**(answers | changes))


def test_gpus_are_read_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    (gpu,), versions, problem = read_gpus()
    assert (versions, problem) == ({"NVIDIA driver": "550.54.15"}, "")
    assert (gpu.name, gpu.memory, gpu.free, gpu.used_by) == ("NVIDIA A100-SXM4-80GB", 80 << 30, 70 << 30, (4711,))
    assert (gpu.ecc_uncorrected, gpu.pending_repair, gpu.throttled) == (2, True, ("hardware thermal slowdown",))
    assert (gpu.clock_limit_mhz, gpu.pcie_width) == (1410, (8, 16))
    assert (gpu.link, gpu.link_kind) == (50e9, "2 NVLinks")


def test_gpus_that_tell_little_are_shown_with_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise FakeNvmlError

    silent = [
        "TotalEccErrors",
        "RemappedRows",
        "CurrentClocksThrottleReasons",
        "NvLinkState",
        "ComputeRunningProcesses",
    ]
    nvml = fake_nvml(**{f"nvmlDeviceGet{name}": unsupported for name in silent})
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    (gpu,), _, _ = read_gpus()
    assert (gpu.ecc_uncorrected, gpu.pending_repair, gpu.throttled, gpu.used_by) == (None, None, (), ())
    assert (gpu.link, gpu.link_kind) == (8 * 1.969e9, "PCIe 4 x8")


def test_machines_without_nvml_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FakeNvmlError("NVML Shared Library Not Found")

    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlInit=fail))
    assert read_gpus() == ((), {}, "NVML does not start: NVML Shared Library Not Found")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_gpus() == ((), {}, "the package nvidia-ml-py is missing")
