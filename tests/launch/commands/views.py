"""Views of a run that was made up, for its pictures."""

from dataclasses import replace
from typing import Any

from mixmae.monitoring.watch.alerts import Alert
from mixmae.monitoring.watch.history import Log
from mixmae.monitoring.watch.scrape import Rank
from mixmae.monitoring.watch.view import View

NOW = 1_700_000_000.0


def events(steps: int = 200, total: int = 1000, until: float = NOW) -> list[dict[str, Any]]:
    """A run that logs every 5 steps, 10 seconds apart, until `until`."""
    since = until - 10 * steps / 5
    found: list[dict[str, Any]] = [
        {"event": "start", "time": since, "step": 0, "world_size": 64, "total_steps": total, "parameters": 10}
    ]
    for step in range(5, steps + 1, 5):
        values = {"loss": 0.4 + 1 / step, "lr": 1.5e-4, "grad_norm": 0.3, "epoch": step / 100, "skipped_steps": 1}
        more = {"images_per_second": 2400.0, "replaced_samples": 7, "peak_memory_bytes": 2**36}
        found.append({"event": "step", "time": since + 2 * step, "step": step, **values, **more})
        if step % 50 == 0:
            folder = f"runs/a/checkpoints/step-{step:08d}"
            found.append({"event": "checkpoint", "time": since + 2 * step, "step": step, "folder": folder})
    return found


def log_of(records: list[dict[str, Any]]) -> Log:
    log = Log()
    for record in records:
        log.add(record)
    return log


def many_ranks(count: int) -> list[Rank]:
    ranks = [Rank(n, f"node{n // 8:03d}", 201, 0.4, 38.0, 0.03, 6e10, 8.5e10, n % 3, "") for n in range(count)]
    if count > 3:
        ranks[3] = replace(ranks[3], age=754.0, step=180, trouble="late", phase="data_wait")
    return sorted(ranks, key=lambda rank: rank.sort_key)


FULL = View(
    "swin_base",
    "mixmae_swin_base_w14, 64 ranks, 1,024 images a step",
    log_of(events()),
    NOW + 1,
    many_ranks(64),
    ["2 of 8 exporters do not respond: node006, node007 (Connection refused)"],
    [Alert("MixmaeStalled", "critical", NOW - 700, "rank 3 has not finished a step for 12 minutes")],
)
