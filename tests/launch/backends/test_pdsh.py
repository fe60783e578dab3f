"""What goes to other hosts arrives there as it was: through DeepSpeed's own runner, the real pdsh, and a shell."""

import argparse
import base64
import json
import os
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mixmae.base.errors import UsageError
from mixmae.launch.backends.hostfile import HostfileBackend
from mixmae.launch.backends.hostfile_parser import HostSlots
from mixmae.launch.backends.job_spec import Attempt, JobSpec
from mixmae.launch.backends.options import add_backend_options, hostfile_backend
from mixmae.launch.backends.remote_environment import (
    _DEEPSPEED,
    environment_file,
    exported_variables,
    quote_for_pdsh,
)
from mixmae.launch.backends.ssh import put_on_hosts
from tests.monitoring.services import needs

TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.sampled_from("äé"), max_size=20)
SSH = """#!/bin/sh
# In ssh's place: runs here what follows the options and the host, joined by spaces as ssh does.
while [ "$1" != node1 ]; do shift; done
shift
exec sh -c "$*"
"""
ATTEMPT = Attempt("20260101T000000Z", 20032, "secret")


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an ssh that goes nowhere, and a launcher that prints its arguments and environment as JSON."""
    folder = tmp_path_factory.mktemp("far")
    (folder / "ssh").write_text(SSH)
    (folder / "ssh").chmod(0o755)
    return folder


def through_pdsh(far: Path, arguments: list[str], exports: str) -> tuple[list[str], dict[str, str]]:
    """What a rank's command gets that DeepSpeed's runner hands to pdsh."""
    args = argparse.Namespace(
        user_args=arguments, user_script="far", launcher_args="", master_addr="a", master_port=1, ssh_port=None
    )
    for name in ("module", "no_python", "no_local_rank", "save_pid", "venv_script"):
        setattr(args, name, None)
    args.enable_each_rank_log = "None"
    runner = PDSHRunner(args, base64.b64encode(b"{}").decode())
    for line in exports.splitlines(keepends=True):  # as runner.main does
        key, value = line.split("=", maxsplit=1)
        runner.add_export(key, value)
    command, _, environment = runner.get_cmd(dict(os.environ), {"node1": [0]})
    launcher = command.index("deepspeed.launcher.launch")
    show = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    command[launcher - 1 : launcher + 1] = ["-c", f"'{show}'"]
    environment["PATH"] = f"{far}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, variables = json.loads(done.stdout.removeprefix("node1: "))
    return found[found.index("far") + 1 :], variables


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=st.lists(TEXT, min_size=1, max_size=3), value=TEXT.map(str.strip))
@example(
    arguments=["encoder.window_size=[8,4,2,1]", "run_dir=/a b/'c'", '"$HOME" `id` \\ %h %n %%'],
    value="%n $HOME `id`",
)
@example(arguments=["a*b;c&d|e>f(g)~#!", "", "x y\\", " "], value='two words "quoted" \\')
@pytest.mark.services
def test_arguments_and_variables_arrive_as_they_were(far: Path, arguments: list[str], value: str) -> None:
    needs("pdsh", "pdsh")
    exports = environment_file({"MIXMAE_TEST": value})
    found, variables = through_pdsh(far, [quote_for_pdsh(argument) for argument in arguments], exports)
    assert found == arguments
    assert variables["MIXMAE_TEST"] == value


@pytest.mark.parametrize("value", ["two\nlines", " leading", "trailing "])
def test_values_that_cannot_travel_are_refused(value: str) -> None:
    with pytest.raises(UsageError, match="NCCL_X="):
        environment_file({"NCCL_X": value})


def test_known_families_travel_and_the_users_own_file_is_heeded(tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (home / ".deepspeed_env").write_text("# mine\n\nWANDB_MODE=offline\nNCCL_DEBUG = WARN\n")
    (here / ".deepspeed_env").write_text("NCCL_DEBUG=INFO=1\n")
    before = {"NCCL_IB_HCA": "mlx5", "CUDA_VISIBLE_DEVICES": "3", "SECRET_KEY": "x", "PATH": "/bin", "HOME": "/root"}
    found = exported_variables(before, home, here)
    assert found == {"NCCL_IB_HCA": "mlx5", "PATH": "/bin", "WANDB_MODE": "offline", "NCCL_DEBUG": "INFO=1"}
    other = tmp_path / "other"
    other.write_text("A=1\n")
    assert exported_variables({"DS_ENV_FILE": str(other)}, home, here) == {"A": "1"}
    other.write_text("A=1\nexport B\n")
    with pytest.raises(UsageError, match=r"other, line 2: 'export B': expected NAME=value"):
        exported_variables({"DS_ENV_FILE": str(other)}, home, here)


def test_the_command_for_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    job = JobSpec("mixmae.trainer.train", ("r.yaml", "a=[1]"), Path("runs/x"))
    secrets = {"MLFLOW_TRACKING_PASSWORD": "$(touch x)", "NCCLX": "$(touch x)"}
    given = {"NCCL_X": "1", "MIXMAE_X": "`id`", "PATH": "/bin", **secrets}
    command = HostfileBackend(HostSlots({"node1": (0, 2), "node2": (0,)}), "10.0.0.1", 2222).command(
        job, ATTEMPT, given
    )
    words = list(command.arguments)
    assert words[1:3] == ["-m", "deepspeed.launcher.runner"]
    options = dict(pairwise(words))
    assert options["--include"] == "node1:0,2@node2:0"
    assert options["--master_addr"] == "10.0.0.1"
    assert options["--ssh_port"] == "2222"
    assert options["--ranks"] == options["--world-size"] == "3"
    assert "--force_multi" in words  # one host alone would else be taken for this one
    assert words[-2:] == ["r.yaml", "'a=[1]'"]
    hostfile, exports = command.files
    (private,) = command.private
    assert options["--environment"] == str(private)
    assert json.loads(command.private[private]) == {"MIXMAE_TOKEN": "secret", "MIXMAE_X": "`id`"}
    assert "secret" not in " ".join(words) + command.describe()
    assert list(command.unset) == ["MLFLOW_TRACKING_PASSWORD", "NCCLX"]
    assert command.environment_in(given) == {"MIXMAE_X": "`id`", "NCCL_X": "1", "PATH": "/bin", **command.environment}
    assert command.environment["DS_ENV_FILE"] == str(exports)
    assert command.environment["PDSH_SSH_ARGS_APPEND"].split()[:2] == ["-o", "ServerAliveInterval=10"]
    assert options["--hostfile"] == str(hostfile)
    assert command.files[hostfile] == "node1 slots=3\nnode2 slots=1\n"
    assert command.files[exports].splitlines() == ["NCCL_X=1", "PATH=/bin", "PYTHONSAFEPATH=1"]


def test_what_deepspeed_exports_by_itself_is_ours_or_unset() -> None:
    """Whatever accelerator it finds here."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.launcher.runner import EXPORT_ENVS

    assert {*EXPORT_ENVS, *get_accelerator().export_envs()} <= set(_DEEPSPEED)


@pytest.mark.services
def test_private_files_reach_hosts_on_standard_input(
    far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{far}{os.pathsep}{os.environ['PATH']}")
    file = tmp_path / "it's new" / "environment.json"
    put_on_hosts(["node1"], {file: '{"A": "$(id)"}'}, 2222)
    assert file.read_text() == '{"A": "$(id)"}'
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("address", ["$(touch x)", "-oProxyCommand=x", "a b", "", "a;b"])
def test_a_master_address_is_a_name_or_an_address(address: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    parser = argparse.ArgumentParser()
    add_backend_options(parser)
    args = parser.parse_args(["--hostfile", str(tmp_path / "hosts"), f"--master-addr={address}"])
    with pytest.raises(UsageError, match="expected a host's name or address"):
        hostfile_backend(args)


def test_a_working_directory_that_a_shell_would_change_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    with pytest.raises(UsageError, match=r"working directory .*a b"):
        HostfileBackend(HostSlots({"node1": (0,)}), "10.0.0.1").command(JobSpec("m", (), Path("r")), ATTEMPT, {})
