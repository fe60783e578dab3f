"""Rank, world size and rendezvous address of this process, from the environment that its launcher set."""

from collections.abc import Mapping
from dataclasses import dataclass

from mixmae.base.errors import UsageError
from mixmae.base.hostlist import expand
from mixmae.base.ports import free_port


@dataclass(frozen=True)
class RankEnv:
    """A rank, its peers, and where they rendezvous."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def environment(self) -> dict[str, str]:
        """The variables that torch and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID")


def read_rank_env(env: Mapping[str, str]) -> RankEnv:
    """The rank as DeepSpeed's launcher or torchrun set it, else as srun does, else that of a single process.

    Raises:
        UsageError: a launcher's variables are set only in part, or are not numbers.
    """
    if any(name in env for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _from_variables(env, _LAUNCHER, env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", ""))
    if "SLURM_STEP_ID" in env and env.get("SLURM_STEP_ID", "").isdigit():
        # Above the exporters' ports, below those of mixmae launch: steps typed by hand and launched jobs share nodes.
        job = env.get("SLURM_JOB_ID", "")
        port = 10_000 + ((int(job) if job.isdecimal() else 0) * 16 + int(env["SLURM_STEP_ID"])) % 10_000
        return _from_variables(
            env, _SLURM, env.get("MASTER_ADDR") or _first_host(env), env.get("MASTER_PORT", str(port))
        )
    return RankEnv(master_port=free_port())


def _from_variables(env: Mapping[str, str], names: tuple[str, ...], address: str, port: str) -> RankEnv:
    missing = [name for name in names if name not in env]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} not set although {next(name for name in names if name in env)} is; start "
            "the run with deepspeed, torchrun or srun, or unset them all for a single process"
        )
    try:
        rank, world_size, local_rank = (int(env[name]) for name in names[:3])
        if not (0 <= rank < world_size and local_rank >= 0 and 0 < int(port) < 2**16):
            raise ValueError
    except ValueError as error:
        raise UsageError(
            f"{', '.join(f'{n}={env[n]}' for n in names[:3])}, MASTER_PORT={port}: expected whole numbers, a rank "
            "below the number of ranks, and a port from 1 to 65535"
        ) from error
    return RankEnv(rank, world_size, local_rank, address, int(port))


def _first_host(env: Mapping[str, str]) -> str:
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    try:
        return expand(hosts)[0]
    except ValueError as error:
        raise UsageError(f"SLURM_STEP_NODELIST: {error}; set MASTER_ADDR to the first node") from error
