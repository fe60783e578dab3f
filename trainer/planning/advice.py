"""Recommended settings, with the overrides to set them."""

from collections.abc import Iterator

from mixmae.trainer.planning.plan import Plan, Run
from mixmae.trainer.recipe.schema import Recipe

_MUCH_COMMUNICATION = 0.2
"""Fraction of a step above which communication is reported."""


def advice(plan: Plan) -> list[str]:
    return list(_advice(plan))


def keys(plan: Plan) -> list[str]:
    """Overrides that turn the recipe into the chosen option; empty if it is the same."""
    chosen, recipe = plan.chosen.option, plan.recipe
    found = []
    if chosen.stage != recipe.train.zero_stage:
        found.append(f"train.zero_stage={chosen.stage}")
    if chosen.micro_batch != recipe.train.micro_batch or plan.note is not None:
        found.append(f"train.micro_batch={chosen.micro_batch}")
    return found + list(_policy_keys(plan, recipe))


def _policy_keys(plan: Plan, recipe: Recipe) -> Iterator[str]:
    wanted, own = plan.work.policies[plan.chosen.option.policy], recipe.train.activation_checkpointing
    if wanted.kind != own.kind:
        yield f"train.activation_checkpointing.kind={wanted.kind}"
    if wanted.kind != "none" and wanted.stages != own.stages:
        stages = "null" if wanted.stages is None else f"[{','.join(wanted.stages)}]"
        yield f"train.activation_checkpointing.stages={stages}"
    if wanted.cpu_offload != own.cpu_offload:
        yield f"train.activation_checkpointing.cpu_offload={str(wanted.cpu_offload).lower()}"


def describe_option(run: Run) -> str:
    """An option in words: `ZeRO 1, micro-batch 16, checkpointing none`."""
    chosen = run.option
    steps = f" x {chosen.accumulation}" if chosen.accumulation > 1 else ""
    return f"ZeRO {chosen.stage}, micro-batch {chosen.micro_batch}{steps}, checkpointing {chosen.policy}"


def _advice(plan: Plan) -> Iterator[str]:
    own, chosen, overrides = plan.own, plan.chosen, keys(plan)
    if overrides:
        yield f"Use {describe_option(chosen)}:"
        yield f"    {' '.join(overrides)}"
        if own.option != chosen.option:
            yield f"The recipe's {describe_option(own)} {_comparison(plan)}."
    else:
        yield f"The recipe's {describe_option(own)} is the best found."
    yield from _about_time(plan)
    yield from _about_data(plan)


def _comparison(plan: Plan) -> str:
    """The recipe's own option compared with the chosen one."""
    needed, limit = plan.own.option.memory.total, plan.cluster.gpu.usable
    longer = plan.own.seconds / plan.chosen.seconds - 1
    if needed > limit:
        return f"does not fit: {needed / 2**30:.1f} of {limit / 2**30:.1f} GiB"
    if longer < -0.005:
        return f"takes {-longer:.0%} less by these estimates, which exclude the latency of gathering module by module"
    return f"takes {longer:.0%} longer" if longer > 0.005 else "is as fast by these estimates"


def _about_time(plan: Plan) -> Iterator[str]:
    chosen, cluster = plan.chosen.option, plan.cluster
    if chosen.communication_seconds is None:
        yield "These times exclude communication between nodes: give the network's rate, such as --link 200gbps."
    elif chosen.communication_seconds > _MUCH_COMMUNICATION * chosen.step_seconds:
        share = chosen.communication_seconds / chosen.step_seconds
        remedy = " or a faster network" if cluster.nodes > 1 else ""
        yield f"Communication takes {share:.0%} of a step; a larger train.global_batch{remedy} lowers it."
    if plan.speed.source.startswith(("assumed", "modelled")):
        yield "The MFU was not measured: run some hundred steps, read mixmae_mfu_ratio, and pass it with --mfu."
    if plan.recipe.train.compile:
        yield "Memory is that of eager mode; compiled blocks (train.compile) usually need less."


def _about_data(plan: Plan) -> Iterator[str]:
    needed, rate = plan.loading, plan.worker_rate
    if rate is None or needed.cores is None or needed.workers is None:
        yield "The loader's cores are unknown: measure them with mixmae bench data RECIPE --photos --json."
        return
    if needed.workers > plan.recipe.data.num_workers:
        of_a_node = " a node" if plan.cluster.nodes > 1 else ""
        yield (
            f"The loader needs {needed.cores} cores{of_a_node} at {rate.images_per_second:,.0f} images/s each: "
            f"data.num_workers={needed.workers}, more on slower cores."
        )
