"""`mixmae doctor [RECIPE]`: checks a cluster before a run, from here and from all ranks; leaves no trace."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from mixmae.launch.backends.options import (
    add_backend_options,
    hostfile_backend,
    local_backend,
    require_matching_options,
    slurm_request,
)
from mixmae.launch.backends.site import find_site, read_site
from mixmae.launch.preflight.preflight import DoctorOptions, check_backend, check_slurm_job
from mixmae.trainer.doctor.protocol.findings import Finding, as_document, exit_code, print_findings
from mixmae.trainer.doctor.protocol.link import link_rate
from mixmae.trainer.recipe.arguments import add_recipe
from mixmae.trainer.recipe.loading import load_recipe

_GPUS = Path("/proc/driver/nvidia/gpus")


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    findings = _examine(args)
    if args.json:
        print(as_document(findings))
    else:
        print_findings(findings, Console(highlight=False))
    return exit_code(findings)


def _examine(args: argparse.Namespace) -> list[Finding]:
    recipe = load_recipe(args.recipe, args.overrides) if args.recipe is not None else None
    options = DoctorOptions(recipe, args.short, args.link)
    if args.slurm:
        return check_slurm_job(
            slurm_request(args, "mixmae-doctor"), read_site(find_site(args.site, os.environ)), options
        )
    if args.hostfile is not None:
        return check_backend(hostfile_backend(args), options)
    return check_backend(local_backend(_accelerators(os.environ) if args.local is None else args.local), options)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mixmae doctor", description=__doc__, allow_abbrev=False)
    add_recipe(parser, optional=True, without="hosts and network alone")
    parser.add_argument("--link", type=_link, help="bandwidth that the network should reach, such as 200gbps or 25GB/s")
    parser.add_argument("--short", action="store_true", help="only checks that take a few seconds, as before a launch")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    add_backend_options(parser, required=False)
    args = parser.parse_intermixed_args(argv)
    require_matching_options(args)
    return args


def _link(text: str) -> str:
    link_rate(text)
    return text


def _accelerators(environment: Mapping[str, str]) -> int:
    """The default number of ranks: one per visible GPU, or one on the host's cores."""
    chosen = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return len(chosen) or len(list(_GPUS.glob("*"))) or 1
