"""A plan as text of up to 100 columns, and as JSON values."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mixmae.base.image_size import shown_size
from mixmae.monitoring.watch.text import amount, duration
from mixmae.trainer.planning.advice import advice, describe_option, keys
from mixmae.trainer.planning.memory import MOST_IMAGES, Memory
from mixmae.trainer.planning.plan import Plan, Run
from mixmae.trainer.planning.traffic import bandwidth

_KINDS = {
    "weights": "weights",
    "gradients": "grads",
    "accumulation": "fp32",
    "optimizer": "optim.",
    "activations": "activ.",
    "buckets": "buckets",
    "temporary": "temp.",
}


def report(plan: Plan) -> RenderableType:
    return Group(
        *_head(plan),
        *_memory(plan),
        *_activations(plan),
        *_time(plan),
        *_input_and_output(plan),
        _title("Advice"),
        *(_line(line) for line in advice(plan)),
    )


def values(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values: bytes, seconds, images per second."""
    return {
        "recipe": plan.recipe.shown(),
        "model": {
            "description": plan.model,
            "parameters": plan.work.parameters.total,
            "model_flops_per_image": plan.work.model_flops,
        },
        "cluster": asdict(plan.cluster),
        "usable_bytes": plan.cluster.gpu.usable,
        "speed": asdict(plan.speed),
        "data": asdict(plan.data),
        "steps": plan.steps,
        "note": plan.note,
        "recipe_run": _run_values(plan, plan.own),
        "chosen_run": _run_values(plan, plan.chosen),
        "keys": keys(plan),
        "stages": [
            {"stage": row.stage, "largest_micro_batch": row.largest, "memory": _memory_values(row.memory)}
            for row in plan.stages
        ],
        "policies": [asdict(row) for row in plan.policies],
        "scaling": [_run_values(plan, run) for run in plan.scaling],
        "checkpoint": asdict(plan.checkpoint),
        "loading": asdict(plan.loading),
        "worker_rate": None if plan.worker_rate is None else asdict(plan.worker_rate),
        "advice": advice(plan),
    }


def _run_values(plan: Plan, run: Run) -> dict[str, Any]:
    chosen = asdict(run.option)
    return {
        **chosen,
        "memory": _memory_values(run.option.memory),
        "step_seconds": run.option.step_seconds,
        "gpus": run.gpus,
        "images_per_second": run.images_per_second,
        "days": run.days,
        "gpu_hours": run.gpu_hours,
        "cost": plan.cost(run),
        "sent_bytes": sum(part.sent(run.gpus) for part in run.option.traffic),
    }


def _memory_values(memory: Memory) -> dict[str, Any]:
    return {**asdict(memory), "total": memory.total}


def _head(plan: Plan) -> Iterator[RenderableType]:
    cluster, work = plan.cluster, plan.work
    nodes = f"{cluster.nodes} nodes" if cluster.nodes > 1 else "one node" if cluster.gpus > 1 else "one GPU"
    link = "" if cluster.link is None or cluster.nodes == 1 else f", {cluster.link * 8 / 1e9:g} Gbit/s each"
    yield Text(f"{plan.model}, on {cluster.gpus} x {cluster.gpu.name}", "bold")
    yield _line(
        f"{work.parameters.total / 1e6:.1f} M parameters, {work.model_flops / 1e9:.3g} GFLOP per image, "
        f"{plan.recipe.train.precision}; {nodes}{link}; {cluster.gpu.usable / 2**30:.1f} of "
        f"{cluster.gpu.memory / 2**30:.1f} GiB usable on a GPU"
    )
    if plan.note is not None:
        yield _line(plan.note, "yellow")


def _memory(plan: Plan) -> Iterator[RenderableType]:
    yield _title(f"Memory of one GPU, GiB: {describe_option(plan.own).partition(', ')[2]}")
    table = _table("ZeRO", *_KINDS.values(), "total", "largest")
    for row in plan.stages:
        sizes = [getattr(row.memory, kind) for kind in _KINDS]
        total = Text(_gib(row.memory.total), _fits(plan, row.memory.total))
        table.add_row(str(row.stage), *map(_gib, sizes), total, _micro(row.largest))
    yield table
    for row in plan.stages:
        if row.memory.moment != "computing":
            yield _line(f"ZeRO {row.stage}: the peak is while {row.memory.moment}, after activations are freed.", "dim")
    yield _line("fp32: accumulated gradients. largest: the largest micro-batch that fits.", "dim")


def _activations(plan: Plan) -> Iterator[RenderableType]:
    yield _title("Activation checkpointing, and the largest micro-batch at each ZeRO stage")
    stages = plan.work.stages
    table = _table("policy", "MiB per image", "FLOPs", *(f"ZeRO {stage}" for stage in stages))
    for row in plan.policies:
        more = f"+{row.recomputed:.0%}" if row.recomputed else "-"
        largest = (_micro(row.largest[stage]) for stage in stages)
        table.add_row(row.policy, f"{row.bytes_per_image / 2**20:.0f}", more, *largest)
    table.columns[0].justify = "left"
    yield table


def _time(plan: Plan) -> Iterator[RenderableType]:
    chosen, cluster = plan.chosen, plan.cluster
    yield _title(f"Time: {describe_option(chosen)}")
    yield _line(
        f"{plan.recipe.train.duration} of {plan.data.images:,} images ({plan.data.source}): {plan.steps:,} steps of "
        f"{plan.recipe.train.global_batch:,} images. MFU {plan.speed.mfu:.2f} while computing, {plan.speed.source}."
    )
    if cluster.gpus > 1:
        yield _sent(plan)
    columns = {name: [cell(plan, run) for run in plan.scaling] for name, cell in _COLUMNS.items()}
    if plan.price is None:
        del columns["cost"]
    if cluster.gpus == 1:
        columns = {name: cells for name, cells in columns.items() if name not in _OF_SEVERAL}
    table = _table(*columns)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    yield table
    if plan.price is not None:
        yield _line(f"cost: {chosen.gpu_hours:,.3g} GPU hours at {plan.price:g} each in the last row.", "dim")


def _sent(plan: Plan) -> Text:
    traffic, gpus = plan.chosen.option.traffic, plan.cluster.gpus
    sent = ", ".join(f"{part.operation} of {_bytes(part.bytes)}" for part in traffic)
    rate = bandwidth(plan.cluster)
    over = "" if rate is None else f", over {rate / 1e9:g} GB/s"
    return _line(f"Each step: {sent}; each GPU sends {_bytes(sum(part.sent(gpus) for part in traffic))}{over}.")


def _efficiency(plan: Plan, run: Run) -> str:
    alone = plan.scaling[0]
    if run.option.communication_seconds is None:
        return "-"
    return f"{run.images_per_second / run.gpus / (alone.images_per_second / alone.gpus):.0%}"


def _sending(plan: Plan, run: Run) -> str:
    wait = run.option.communication_seconds
    return "?" if wait is None else f"{wait / run.option.step_seconds:.0%}"


def _batches(plan: Plan, run: Run) -> str:
    found = run.option
    return f"{found.micro_batch}" + (f" x {found.accumulation}" if found.accumulation > 1 else "")


_COLUMNS: dict[str, Callable[[Plan, Run], str]] = {
    "GPUs": lambda _, run: str(run.gpus),
    "micro-batch": _batches,
    "step": lambda _, run: _seconds(run.option.step_seconds),
    "sending": _sending,
    "images/s": lambda _, run: amount(round(run.images_per_second)),
    "per GPU": lambda _, run: amount(round(run.images_per_second / run.gpus)),
    "efficiency": _efficiency,
    "time": lambda _, run: duration(run.seconds),
    "cost": lambda plan, run: f"{plan.cost(run) or 0:,.2f}",
}
_OF_SEVERAL = ("GPUs", "sending", "per GPU", "efficiency")
"""Columns that say nothing of one GPU."""


def _input_and_output(plan: Plan) -> Iterator[RenderableType]:
    saved, needed, cluster = plan.checkpoint, plan.loading, plan.cluster
    of_a_node = " of a node" if cluster.nodes > 1 else ""
    yield _title("Checkpoints and data")
    kept = f"{plan.recipe.checkpoint.keep} kept and one being written: {_bytes(saved.kept_bytes)} of disk."
    share = f", each rank {_bytes(saved.share)}" if cluster.gpus > 1 else ""
    blocked = f"A checkpoint: {_bytes(saved.bytes)}{share}. It blocks training for at least "
    if plan.recipe.checkpoint.asynchronous:
        copied = f"{_seconds(saved.stall)} (copy to host memory at {cluster.gpu.host / 1e9:g} GB/s)"
        yield _line(f"{blocked}{copied}; written after {_seconds(saved.seconds)}. {kept}")
    else:
        yield _line(f"{blocked}{_seconds(saved.stall)}, until it is written. {kept}")
    cores = "" if needed.cores is None else f", {needed.cores} {'core' if needed.cores == 1 else 'cores'}"
    yield _line(
        f"The loader{of_a_node}: {amount(round(needed.images_per_second))} images/s, "
        f"{_bytes(needed.bytes_per_second)}/s at {_bytes(plan.data.mean_bytes)} an image{cores}."
    )
    if plan.worker_rate is not None:
        rate = plan.worker_rate
        yield _line(
            f"Cores by {rate.file}: {rate.images_per_second:,.0f} images/s on one core ({rate.cpu}), to "
            f"{shown_size(rate.img_size)} px.",
            "dim",
        )
    yield _line(
        f"Host memory{of_a_node}: {_bytes(saved.host_bytes)} for copies of checkpoints, "
        f"{_bytes(needed.host_bytes)} for decoded batches, besides the processes' own."
    )


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _title(text: str) -> RenderableType:
    return Group(Text(), Text(text, "bold"))


def _line(text: str, style: str = "") -> Text:
    """A paragraph; an indented line is a command, and is not wrapped."""
    is_command = text.startswith(" ")
    return Text(text, style, no_wrap=is_command, overflow="ignore" if is_command else "fold")


def _fits(plan: Plan, size: float) -> str:
    return "bold" if size <= plan.cluster.gpu.usable else "bold red"


def _gib(size: float) -> str:
    if not size:
        return "-"
    return f"{size / 2**30:.1f}" if size >= 10 * 2**30 else f"{size / 2**30:.2f}"


def _micro(largest: int) -> str:
    if not largest:
        return "none"
    return str(largest) if largest < MOST_IMAGES else f"{MOST_IMAGES}+"


def _bytes(size: float) -> str:
    """In decimal units."""
    unit, name = next(((u, n) for u, n in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if size >= u), (1e3, "KB"))
    return f"{size / unit:.3g} {name}"


def _seconds(seconds: float) -> str:
    return duration(seconds) if seconds >= 90 else f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
