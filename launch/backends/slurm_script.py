"""Ranks under Slurm: writes a batch script that can be read, kept and submitted by hand."""

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import LOGS
from mixmae.launch.backends.job_spec import FIRST_PORT, PORT_BLOCK, PORT_BLOCKS, JobSpec
from mixmae.launch.backends.module_path import module_path_in_shell
from mixmae.launch.backends.site import Site
from mixmae.launch.backends.slurm_array import TASK, parse_array
from mixmae.launch.supervision.outcome import ENDED
from mixmae.launch.supervision.token import TOKEN

_INDENT = " " * 4
_POLL_SECONDS, _EXIT_SECONDS = 2, 50
"""How often a batch script checks on srun, and how long srun may take to exit after the first supervisor has."""


@dataclass(frozen=True)
class SlurmRequest:
    """What a job requests from Slurm.

    Attributes:
        ranks_per_node: one per GPU, or on CPUs.
        gpus: whether each rank gets a GPU.
        cpus_per_rank: cores; None is the cluster's default.
        array: as sbatch takes it.
    """

    nodes: int
    ranks_per_node: int
    gpus: bool = True
    cpus_per_rank: int | None = None
    name: str = "mixmae"
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    array: str | None = None

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def slurm_script(
    job: JobSpec,
    request: SlurmRequest,
    site: Site,
    max_restarts: int,
    preflight: bool = False,
    take_over: bool = False,
) -> str:
    """The batch script of a job; `{task}` in its directory and arguments stands for the number of the array task.

    Args:
        max_restarts: restarts in a row without a new checkpoint after which the run is given up.
        preflight: whether its nodes are checked before the first start; errors end the job there.
        take_over: whether its first start takes the run from a process that has it.

    Raises:
        UsageError: a value cannot be written in an #SBATCH line.
    """
    parts = [
        _header(job, request, site),
        _site(site),
        _settings(job, site),
        _start(job, site, take_over),
        _launcher(request) if _per_node(job) else "",
        _preflight(job, request, site) if preflight else "",
        _ranks(job, request, site),
        _end(max_restarts),
    ]
    return "\n".join(filter(None, parts))


def submit(script: str, job: JobSpec, array: str | None) -> str:
    """Submits a script with sbatch; returns the job id.

    Raises:
        UsageError: sbatch is missing or refuses it.
    """
    for task in parse_array(array) if array is not None else [0]:
        Path(str(job.run_dir).replace(TASK, str(task)), LOGS).mkdir(parents=True, exist_ok=True)
    command = ["sbatch", "--parsable"]
    try:
        done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UsageError("sbatch is not on PATH; run this on a login node of the cluster, or use --dry-run") from error
    if done.returncode:
        raise UsageError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def output_file(job: JobSpec, request: SlurmRequest) -> str:
    """The job's output file, as sbatch takes it: %j and the like are Slurm's."""
    folder = str(job.run_dir).replace("%", "%%").replace(TASK, "%a")
    return f"{folder}/logs/slurm-{'%A_%a' if request.array else '%j'}.out"


def _per_node(job: JobSpec) -> bool:
    return job.settings.tasks == "per_node"


def _header(job: JobSpec, request: SlurmRequest, site: Site) -> str:
    tasks_per_node, cpus = request.ranks_per_node, request.cpus_per_rank
    if _per_node(job):
        tasks_per_node, cpus = 1, cpus and cpus * request.ranks_per_node
    options = {
        "job-name": request.name,
        "nodes": request.nodes,
        "ntasks-per-node": tasks_per_node,
        "gpus-per-node": request.ranks_per_node if request.gpus else None,
        "cpus-per-task": cpus,
        "time": request.time,
        "partition": request.partition or site.partition,
        "account": request.account or site.account,
        "qos": request.qos or site.qos,
        "array": request.array,
        "output": output_file(job, request),
    }
    asked = [f"#SBATCH --{name}={_directive(str(value))}" for name, value in options.items() if value is not None]
    folder = "the folder of --output" if request.array else shlex.quote(f"{job.run_dir}/logs")
    by_hand = f"To submit it by hand: create {folder} and the recipe, as --dry-run prints it, then sbatch."
    title = shlex.join([job.module, *job.arguments]).replace("\n", " ")
    return "\n".join(
        [
            "#!/bin/bash",
            f"# {title}",
            f"# on {request.ranks} ranks, made by 'mixmae launch'. {by_hand}",
            *asked,
            *(f"#SBATCH {option}" for option in site.sbatch),
            "# It is signalled before its time limit, saves, and continues after a requeue, in the same output file.",
            "#SBATCH --requeue",
            "#SBATCH --open-mode=append",
            f"#SBATCH --signal=B:USR1@{max(1, round(job.settings.grace_seconds))}",
            "",
            "set -uo pipefail",
            "",
        ]
    )


def _directive(value: str) -> str:
    if re.search(r"[\s\"'#\\]", value):
        raise UsageError(f"{value!r} cannot be written in an #SBATCH line; use a name without spaces, quotes and #")
    return value


def _site(site: Site) -> str:
    lines = ["module purge", *(f"module load {shlex.quote(name)}" for name in site.modules)] if site.modules else []
    lines += [*site.setup, *(f"export {name}={shlex.quote(value)}" for name, value in site.environment.items())]
    return "\n".join(["# From the site file.", *lines, ""]) if lines else ""


def _settings(job: JobSpec, site: Site) -> str:
    lines = [
        "# What is run.",
        f"export {module_path_in_shell()}",
        f"python={shlex.quote(site.python or sys.executable)}",
        f"run_dir={_word(str(job.run_dir))}",
        *_bash_array("arguments", [_word(argument) for argument in job.arguments]),
    ]
    if site.container.srun:
        lines += _bash_array("container", [shlex.quote(option) for option in site.container.srun])
    if site.container.prefix:
        lines += _bash_array("inside", [shlex.quote(word) for word in site.container.prefix])
    return "\n".join([*lines, ""])


def _bash_array(name: str, words: Sequence[str]) -> list[str]:
    return [f"{name}=(", *(f"    {word}" for word in words), ")"]


def _word(text: str) -> str:
    """A bash word, quoted; `{task}` becomes Slurm's variable."""
    quoted = [shlex.quote(part) if part else "" for part in text.split(TASK)]
    return '"$SLURM_ARRAY_TASK_ID"'.join(quoted) or "''"


def _start(job: JobSpec, site: Site, take_over: bool) -> str:
    block = f"$(({FIRST_PORT} + {PORT_BLOCK} * ((SLURM_JOB_ID + 7 * restarts) % {PORT_BLOCKS})))"
    once = "srun --overlap --nodes=1 --ntasks=1 " if site.container.srun else ""
    return f"""\
# This start: its folder for records, the address and port of its coordinator, and the secret that authenticates it.
restarts=${{SLURM_RESTART_COUNT:-0}}
attempt=$(date --utc +%Y%m%dT%H%M%SZ)-job$SLURM_JOB_ID-$restarts
port={job.settings.port or block}
{TOKEN}=$(od --address-radix=n --read-bytes=16 --format=x1 /dev/urandom | tr --delete ' \\n')
[[ -z ${{SLURM_CPUS_PER_TASK:-}} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
mkdir --parents "$run_dir/logs/$attempt"
(umask 077 && cp "$0" "$run_dir/logs/$attempt/job.sh")
batch() {{
    local step=$1
    shift
    {once}{_inside(site)}"$python" -m mixmae.launch.backends.slurm_job_steps "$step" \\
        --run-dir "$run_dir" --attempt "$attempt" "$@"
}}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2> /dev/null || batch hosts)
MASTER_ADDR=${{hosts%%$'\\n'*}}
export MASTER_ADDR {TOKEN}
batch begin --launch "job$SLURM_JOB_ID" --restarts "$restarts"{" --take-over" if take_over else ""}
"""


def _launcher(request: SlurmRequest) -> str:
    """The launcher of a job with one task per node."""
    return f"""\
# One task per node: DeepSpeed's launcher, which starts its ranks. Signals that would kill it are ignored.
hostfile=$run_dir/logs/$attempt/hostfile
sed 's/$/ slots={request.ranks_per_node}/' <<< "$hosts" > "$hostfile"
launcher='trap "" USR1 USR2; exec "$0" -m deepspeed.launcher.runner --node_rank "$SLURM_NODEID" "$@"'
"""


def _tasks(job: JobSpec, site: Site) -> str:
    """The command for all ranks, up to the name of a module."""
    start = f"srun --kill-on-bad-exit=1 {_container(site)}\\\n{_INDENT}{_inside(site)}"
    if not _per_node(job):
        return f'{start}"$python" -m'
    return f"""{start}bash -c "$launcher" "$python" --log_level error --hostfile "$hostfile" --no_ssh \\
    --master_addr "$MASTER_ADDR" --master_port "$port" --no_local_rank --module"""


def _preflight(job: JobSpec, request: SlurmRequest, site: Site) -> str:
    return f"""\
# Preflight checks of the nodes before the first start, as by 'mixmae doctor'.
preflight() {{
    {_tasks(job, site).replace(_INDENT, 2 * _INDENT)} \\
        mixmae.trainer.doctor --short --world-size {request.ranks} "${{arguments[@]}}"
}}
if ((restarts == 0)) && ! preflight; then
    echo "mixmae: error: preflight checks found errors on the nodes, shown above; fix them, or use --skip-preflight" >&2
    exit 1
fi
"""


def _ranks(job: JobSpec, request: SlurmRequest, site: Site) -> str:
    return f"""\
# A supervisor per rank, which starts it.
{_tasks(job, site)} mixmae.launch.supervision.rank \\
{_rank_arguments(job, request)} &
ranks=$!
"""


def _rank_arguments(job: JobSpec, request: SlurmRequest) -> str:
    """The supervisor's options, over a few lines."""
    words = job.rank_arguments(request.ranks, "$attempt", "$port", launcher=False)
    options = words[: len(words) - len(job.arguments)]
    options[options.index("--run-dir") + 1] = "$run_dir"
    quoted = [f'"{word}"' if word.startswith("$") else shlex.quote(word) for word in options]
    split = quoted.index("--join-seconds"), quoted.index(job.module)
    rows = [quoted[: split[0]], quoted[split[0] : split[1]], [*quoted[split[1] :], '"${arguments[@]}"']]
    return " \\\n".join(f"    {' '.join(row)}" for row in rows)


def _inside(site: Site) -> str:
    return '"${inside[@]}" ' if site.container.prefix else ""


def _container(site: Site) -> str:
    return '"${container[@]}" ' if site.container.srun else ""


def _end(max_restarts: int) -> str:
    return f"""\
# A signal to this script is forwarded to the ranks, and to nothing else that they started; they save and exit.
stop() {{
    batch stop --port "$port" --signal "SIG$1" || kill -s "$1" "$ranks"
}}
trap 'stop USR1' USR1
trap 'stop TERM' TERM
# Supervisors end together and leave a file; srun would wait forever for one whose slurmstepd was killed.
waits=0
while kill -s 0 "$ranks" 2> /dev/null; do
    sleep {_POLL_SECONDS} &
    wait -n "$ranks" "$!"
    [[ ! -e $run_dir/logs/$attempt/{ENDED} ]] || ((++waits < {_EXIT_SECONDS // _POLL_SECONDS})) || kill -s KILL "$ranks"
done
trap - USR1 TERM
wait

# The outcome, and whether to requeue the job: not if it was cancelled, Slurm requeues it already, or nothing here can.
max_restarts={max_restarts}
command -v scontrol > /dev/null || max_restarts=0
job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
job=${{job:-$SLURM_JOB_ID}}
state=$(squeue --noheader --jobs="$job" --format=%T)
decision=$(batch end --launch "job$SLURM_JOB_ID" --job-state "$state" --max-restarts "$max_restarts")
code=$?
if [[ $decision == requeue ]]; then
    scontrol requeue "$job" && exec sleep 600 # Slurm kills it meanwhile; a child could outlive this script
    echo "mixmae: error: the job could not be requeued and ends here; submit it again to continue the run" >&2
fi
exit "$code"
"""
