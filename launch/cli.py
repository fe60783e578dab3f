"""The command `mixmae`. Subcommands are modules with a `main(argv)`, imported only when they are called for."""

import errno
import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import version

from mixmae.base.errors import UsageError, run_cli

COMMANDS = {
    "launch": ("mixmae.launch.commands.launch", "start a pretraining run: on this machine, on hosts, or under Slurm"),
    "recipes": (
        "mixmae.launch.commands.recipes",
        "list the recipes that ship; show NAME, suggest SHARDS",
    ),
    "doctor": (
        "mixmae.launch.commands.doctor",
        "check hosts, network, shards and run directory, from here and from all ranks",
    ),
    "shards": ("mixmae.trainer.data.shards.cli", "WebDataset shards: build, synth, index, check"),
    "export": ("mixmae.trainer.export.export", "write a run's encoder as safetensors that timm opens"),
    "import": ("mixmae.trainer.export.import_mixmim", "read a released MixMIM checkpoint into an encoder directory"),
    "probe": ("mixmae.trainer.evaluation.probe", "kNN and linear probe of an encoder on labelled shards"),
    "evaluate": (
        "mixmae.launch.commands.evaluate",
        "top-1, top-5, per class and kNN accuracy of a model on labelled shards",
    ),
    "predict": ("mixmae.trainer.evaluation.predict", "what a classifier takes images for"),
    "plan": ("mixmae.trainer.planning.cli", "memory, time and cost of a recipe on a cluster, before it is started"),
    "watch": ("mixmae.launch.commands.watch", "watch progress, ranks and alerts of runs in a terminal"),
    "monitor": (
        "mixmae.launch.commands.monitor",
        "Prometheus and Alertmanager for runs on this machine: monitor up RUN_DIR",
    ),
    "curves": ("mixmae.trainer.telemetry.curves", "draw the loss curves of runs into one picture"),
    "bench": (
        "mixmae.trainer.benchmarks.cli",
        "measure parts of a run beside a reference: step, loop, scale, data, monitoring, checkpoints, ...",
    ),
    "demo": (
        "mixmae.launch.commands.demo",
        "build shards, train, export and probe: minutes on a CPU",
    ),
}

_HEAD = """usage: mixmae COMMAND ...

Pretraining of hierarchical vision backbones under DeepSpeed, from WebDataset shards to a timm encoder.

commands:
"""


def usage() -> str:
    lines = [f"  {name:<8} {text}" for name, (_, text) in COMMANDS.items()]
    return _HEAD + "\n".join(lines) + "\n\n'mixmae COMMAND --help' tells more; 'mixmae --version' the version."


def main() -> int:
    command, *rest = sys.argv[1:] or ["--help"]
    return run_cli(lambda argv: _run(command, argv), rest)


def _run(command: str, argv: Sequence[str]) -> int:
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command in ("-V", "--version"):
        print(f"mixmae {version('mixmae')}")
        return 0
    if command not in COMMANDS:
        raise UsageError(f"no command {command!r}; {_instead_of(command)}")
    if "" in argv:  # which would name the working directory
        before = " ".join(["mixmae", command, *argv[: argv.index("")]])
        raise UsageError(f"the argument after '{before}' is empty; expected a value: is a shell variable not set?")
    module = importlib.import_module(COMMANDS[command][0])
    try:
        return int(module.main(argv))
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UsageError(f"a file, or standard output, cannot be written: {error.strerror}") from error
        if error.filename is None or error.strerror is None:
            raise
        raise UsageError(f"{error.filename}: {error.strerror}") from error


def _instead_of(command: str) -> str:
    """The command that was meant, or the list of all."""
    if close := get_close_matches(command, COMMANDS, n=1):
        return f"did you mean 'mixmae {close[0]}'?"
    return f"expected one of {', '.join(COMMANDS)}"


if __name__ == "__main__":
    sys.exit(main())
