"""Batch scripts: what they ask for, that bash reads them, that values arrive in them as they were typed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmae.base.errors import UsageError
from mixmae.launch.backends.job_spec import JobSpec
from mixmae.launch.backends.options import slurm_request
from mixmae.launch.backends.site import Container, Site, find_site, read_site
from mixmae.launch.backends.slurm_array import load_array, parse_array
from mixmae.launch.backends.slurm_script import SlurmRequest, slurm_script
from mixmae.launch.commands import launch
from mixmae.launch.supervision.outcome import ENDED
from mixmae.trainer.recipe.sections.launch import Launch
from tests.helpers import ROOT

RECIPE = ROOT / "configs" / "pretrain" / "demo.yaml"
JOB = JobSpec("mixmae.trainer.train", ("configs/x.yaml", "train.micro_batch=64"), Path("runs/x"))
REQUEST = SlurmRequest(2, 8, name="x", time="1-00:00:00")
SITE = """
partition: gpu
account: vision
modules: [cuda/12.4, nccl]
setup: [ulimit -n 65536]
environment: {NCCL_SOCKET_IFNAME: ib0, WORDS: "two words"}
sbatch: [--constraint=a100, --exclusive]
container:
  srun: ["--container-image=/images/mix mae.sqsh", "--container-mounts=/data:/data"]
  prefix: [apptainer, exec, --nv, /images/mixmae.sif]
python: python3
"""


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def checked(script: str) -> str:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return script


@pytest.mark.parametrize("kind", ["per_gpu", "per_node"])
@pytest.mark.parametrize("site", [None, SITE])
@pytest.mark.parametrize("array", [None, "0-3%2"])
def test_every_script_is_one_that_bash_reads(tmp_path: Path, kind: str, site: str | None, array: str | None) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(site or "")
    job = JobSpec(JOB.module, JOB.arguments, Path("runs/x-{task}"), Launch(tasks=kind))
    script = checked(slurm_script(job, SlurmRequest(2, 8, array=array), read_site(file), 3, preflight=True))
    assert "/tmp" not in script.replace(sys.executable, "")
    assert script.endswith('exit "$code"\n')


def test_what_a_job_asks_for() -> None:
    assert directives(slurm_script(JOB, REQUEST, Site(), 3)) == [
        "--job-name=x",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=1-00:00:00",
        "--output=runs/x/logs/slurm-%j.out",
        "--requeue",
        "--open-mode=append",
        "--signal=B:USR1@120",
    ]


def test_a_task_per_node_gets_the_cores_of_all_its_ranks() -> None:
    job = JobSpec(JOB.module, JOB.arguments, JOB.run_dir, Launch(tasks="per_node", grace_seconds=45))
    script = slurm_script(job, SlurmRequest(2, 8, cpus_per_rank=6, gpus=False), Site(), 3)
    asked = directives(script)
    assert {"--ntasks-per-node=1", "--cpus-per-task=48", "--signal=B:USR1@45"} <= set(asked)
    assert not any(option.startswith("--gpus") for option in asked)
    assert "sed 's/$/ slots=8/'" in script
    assert "deepspeed.launcher.runner" in script


@pytest.mark.parametrize(
    ("options", "cores"),
    [
        (["--gpus-per-node", "8"], 9),
        (["--gpus-per-node", "8", "--cpus-per-rank", "4"], 4),
        (["--tasks-per-node", "8"], None),
    ],
)
def test_a_rank_with_a_gpu_gets_cores_for_its_data_workers(options: list[str], cores: int | None) -> None:
    """Slurm's default is one core for a rank and all its workers."""
    assert slurm_request(launch.parse(["recipe.yaml", "--slurm", *options]), "x", num_workers=8).cpus_per_rank == cores


@pytest.mark.parametrize("kind", ["per_gpu", "per_node"])
def test_nodes_are_looked_at_as_ranks_are_started(kind: str) -> None:
    job = JobSpec(JOB.module, JOB.arguments, JOB.run_dir, Launch(tasks=kind))
    script = slurm_script(job, SlurmRequest(2, 8), Site(), 3, preflight=True)
    lines = [line.strip() for line in script.replace("\\\n", " ").splitlines()]
    preflight, train = (" ".join(line.split()) for line in lines if line.startswith("srun"))
    start, _, options = preflight.partition("mixmae.trainer.doctor")
    assert train.startswith(f"{start}mixmae.launch.supervision.rank")
    assert options == ' --short --world-size 16 "${arguments[@]}"'
    assert "mixmae.trainer.doctor" not in slurm_script(job, SlurmRequest(2, 8), Site(), 3)


def test_what_the_site_wants(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(SITE)
    script = slurm_script(JOB, REQUEST, read_site(file), 3)
    asked = directives(script)
    assert {"--partition=gpu", "--account=vision", "--constraint=a100", "--exclusive"} <= set(asked)
    assert "module purge\nmodule load cuda/12.4\nmodule load nccl\nulimit -n 65536\n" in script
    assert "export NCCL_SOCKET_IFNAME=ib0\nexport WORDS='two words'\n" in script
    assert "    '--container-image=/images/mix mae.sqsh'\n" in script
    assert "inside=(\n    apptainer\n    exec\n    --nv\n    /images/mixmae.sif\n)" in script
    assert (
        'srun --kill-on-bad-exit=1 "${container[@]}" \\\n    "${inside[@]}" "$python" -m mixmae.launch.supervision.rank'
        in script
    )
    assert "python=python3\n" in script
    own = slurm_script(JOB, SlurmRequest(2, 8, partition="debug"), read_site(file), 3)
    assert "--partition=debug" in directives(own)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=15), min_size=1, max_size=4))
def test_arguments_arrive_as_they_were_typed(arguments: list[str]) -> None:
    script = slurm_script(JobSpec("m", arguments, Path("runs/a-b")), SlurmRequest(1, 1), Site(), 0)
    assigned = script[script.index("run_dir=") : script.index("# This start")]
    show = assigned + 'printf "%s\\0" "$run_dir" "${arguments[@]}"'
    done = subprocess.run(["bash", "-uc", show], env={"SLURM_ARRAY_TASK_ID": "7"}, capture_output=True, check=True)
    expected = [text.replace("{task}", "7") for text in ("runs/a-b", *arguments)]
    assert done.stdout.decode().split("\0")[:-1] == expected


def test_a_task_of_an_array_has_its_own_values() -> None:
    job = JobSpec("m", ("seed={task}", "run_dir=runs/x-{task}"), Path("runs/x-{task}"))
    script = slurm_script(job, SlurmRequest(1, 1, array="0-3"), Site(), 0)
    assert "--output=runs/x-%a/logs/slurm-%A_%a.out" in directives(script)
    assert '    seed="$SLURM_ARRAY_TASK_ID"\n    run_dir=runs/x-"$SLURM_ARRAY_TASK_ID"\n' in script


def test_names_that_sbatch_would_misread_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot be written in an #SBATCH line"):
        slurm_script(JOB, SlurmRequest(1, 1, name="two words"), Site(), 0)


@pytest.mark.parametrize(
    ("array", "numbers"),
    [("0-3", [0, 1, 2, 3]), ("1,3,5-9:2%4", [1, 3, 5, 7, 9]), ("7", [7]), ("3,1-3", [1, 2, 3])],
)
def test_array_specifications(array: str, numbers: list[int]) -> None:
    assert parse_array(array) == numbers


@pytest.mark.parametrize("array", ["", "a", "1-", "3-1", "0-3%", "0-3%x", "1,,2", "0-999999999"])
def test_bad_array_specifications_are_refused(array: str) -> None:
    with pytest.raises(UsageError, match="--array"):
        parse_array(array)


def test_tasks_that_would_share_a_run_directory_are_refused() -> None:
    with pytest.raises(UsageError, match=r"tasks 0 and 1 would share run_dir=runs/x; put {task} into it"):
        load_array(RECIPE, ["run_dir=runs/x"], "0-1")
    recipes, run_dir = load_array(RECIPE, ["run_dir=runs/x-{task}", "seed={task}"], "3-5")
    assert [recipe.seed for recipe in recipes] == [3, 4, 5]
    assert [str(recipe.run_dir) for recipe in recipes] == ["runs/x-3", "runs/x-4", "runs/x-5"]
    assert str(run_dir) == "runs/x-{task}"
    assert load_array(RECIPE, ["run_dir=runs/x"], "4")[1] == Path("runs/x")
    with pytest.raises(UsageError, match="expected a plain path"):
        load_array(RECIPE, ["run_dir='runs/x-{task}'"], "3-5")
    with pytest.raises(UsageError, match="seed"):
        load_array(RECIPE, ["run_dir=runs/x-{task}", "seed=a{task}"], "3-5")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("partitions: gpu", "unknown key 'partitions'; did you mean 'partition'"),
        ("container: {image: x}", "unknown key 'container.image'"),
        ("sbatch: [constraint=a100]", "expected an option of sbatch"),
        ("environment: {A-B: 1}", "expected a variable's name"),
        ('setup: ["a\\nb"]', "expected one line"),
        ("modules: [", "is not valid YAML"),
        ("modules: []\nmodules: []", "line 2"),
    ],
)
def test_bad_site_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(content)
    with pytest.raises(UsageError) as raised:
        read_site(file)
    assert message in str(raised.value)


def test_where_a_site_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    mine, named, given = tmp_path / ".config" / "mixmae" / "site.yaml", tmp_path / "named", tmp_path / "given"
    assert find_site(None, {}) is None
    for file in (mine, named, given):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert find_site(None, {}) == mine
    assert find_site(None, {"MIXMAE_SITE": str(named)}) == named
    assert find_site(given, {"MIXMAE_SITE": str(named)}) == given
    with pytest.raises(UsageError, match=r"MIXMAE_SITE=/nowhere: no such file"):
        find_site(None, {"MIXMAE_SITE": "/nowhere"})
    assert read_site(None) == Site(container=Container())


@pytest.mark.parametrize("over", [True, False])
def test_a_step_that_never_ends_is_left_once_its_supervisors_are_gone(tmp_path: Path, over: bool) -> None:
    """As srun does for a task whose slurmstepd was killed; while supervisors live, it is waited for."""
    script = slurm_script(JOB, REQUEST, Site(), 3)
    waiting = script[script.index("waits=0") : script.index("# The outcome")]
    (tmp_path / "logs" / "a").mkdir(parents=True)
    if over:
        (tmp_path / "logs" / "a" / ENDED).touch()
    ended = tmp_path / "ended"
    step = f"{{ /bin/sleep 3; touch {ended}; }} & ranks=$!"
    begin = f"run_dir={tmp_path} attempt=a\n{step}\nsleep() {{ /bin/sleep 0.05; }}"  # a shorter look
    subprocess.run(["bash", "-uc", f"{begin}\n{waiting}"], stderr=subprocess.DEVNULL, timeout=60, check=True)
    assert ended.exists() != over


TOOLS = ("bash", "cat", "cp", "date", "mkdir", "od", "sed", "sleep", "tr")
PYTHON = """#!/bin/bash
# In the place of the steps around a job, and of its ranks.
case "$*" in
    *"slurm_job_steps hosts"*) printf 'node07\\nnode08\\n' ;;
    *"slurm_job_steps end"*) echo "$@" > ended; [[ $* == *"--max-restarts 0" ]] || echo requeue; exit 1 ;;
    *supervision.rank*) echo "$MASTER_ADDR" > address ;;
esac
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
exec "$@"
"""


@pytest.mark.parametrize("scontrol", [None, "#!/bin/bash\nexit 1\n"], ids=["missing", "failing"])
@pytest.mark.parametrize("kind", ["per_gpu", "per_node"])
def test_a_job_on_nodes_where_scontrol_does_not_work(tmp_path: Path, kind: str, scontrol: str | None) -> None:
    """It finds its first node, and does not say that it goes on where nothing can requeue it."""
    programs = {"python": PYTHON, "srun": SRUN, "squeue": "#!/bin/bash\necho RUNNING\n", "scontrol": scontrol}
    for name, text in programs.items():
        if text is not None:
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
    for name in TOOLS:
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    job = JobSpec(JOB.module, JOB.arguments, tmp_path / "run", Launch(tasks=kind))
    (tmp_path / "job.sh").write_text(slurm_script(job, REQUEST, Site(python=str(tmp_path / "python")), 3))
    environment = {"PATH": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[07-08]"}
    done = subprocess.run(
        ["bash", "job.sh"], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 1
    assert (tmp_path / "ended").read_text().endswith(f"--max-restarts {0 if scontrol is None else 3}\n")
    assert done.stderr.count("could not be requeued and ends here; submit it again") == (scontrol is not None)
    if kind == "per_gpu":
        assert (tmp_path / "address").read_text() == "node07\n"
    else:
        (hostfile,) = (tmp_path / "run" / "logs").glob("*/hostfile")
        assert hostfile.read_text() == "node07 slots=8\nnode08 slots=8\n"
    (copied,) = (tmp_path / "run" / "logs").glob("*/job.sh")
    assert copied.stat().st_mode & 0o077 == 0
