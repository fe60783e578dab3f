"""Who is late, slow or starved, and on which node."""

from mixmae.monitoring.boards.panels import (
    HERE,
    LINES,
    NOW,
    RANK,
    RUN,
    WHOLE,
    Board,
    Row,
    Unit,
    gauge_of,
    heatmap,
    least,
    lines,
    most,
    per_step,
    rate,
    spread,
    table,
)

_LAST = table(
    "Furthest behind",
    "The ranks that came to the fewest parts of steps, where they are now, and how many parts they are behind.",
    f"(scalar(max(mixmae_parts_total{RUN})) - bottomk({LINES}, max by (node, rank) (mixmae_parts_total{HERE})))"
    f" * on (node, rank) group_right () max by (node, rank, part) (mixmae_rank_part{HERE} == 1)",
    "rank $rank on $node is in $part",
)

BOARD = Board(
    "ranks",
    "Ranks and nodes",
    (
        Row("Furthest behind", (_LAST,)),
        Row(
            "Late, slow or starved",
            (
                lines("Silence, longest", Unit.SECONDS, "Time since each rank finished a step; the latest ranks.",
                      (f"time() - (max by (node, rank) (mixmae_heartbeat_timestamp_seconds{HERE}) and"
                       f" bottomk({LINES}, max by (node, rank)"
                       f" (last_over_time(mixmae_heartbeat_timestamp_seconds{HERE}{WHOLE}))))", RANK)),
                lines("Behind the first rank", Unit.COUNT,
                      "Parts of steps. All ranks come to the same ones, so a rank that stays behind is one that hangs.",
                      (f"scalar(max(mixmae_parts_total{RUN})) - (max by (node, rank) (mixmae_parts_total{HERE}) and"
                       f" bottomk({LINES}, max by (node, rank) (last_over_time(mixmae_parts_total{HERE}{WHOLE}))))",
                       RANK)),
                lines("Where ranks are", Unit.COUNT,
                      "Ranks by the part that they are at: if one hangs, all others stand where they wait for it.",
                      (f"sum by (part) (mixmae_rank_part{HERE})", "$part")),
                lines("Steps per second", Unit.PER_SECOND, "Of the ranks; they differ only when one hangs.",
                      *spread(f"rate(mixmae_optimizer_steps_total{HERE}{NOW})")),
                lines("Own work of a step, slowest ranks", Unit.SECONDS,
                      "Data wait and forward, before ranks wait for one another: who is slow here slows all.",
                      (most(per_step("data_wait|forward")), RANK)),
                lines("Backward of a step, shortest", Unit.SECONDS,
                      "The rank that all wait for waits least itself: a rank far below the others is the slow one.",
                      (least(per_step("backward")), RANK)),
                lines("Data wait of a step, longest", Unit.SECONDS, "The ranks that wait longest for their data.",
                      (most(per_step("data_wait")), RANK)),
                lines("Own work of a step", Unit.SECONDS, "Data wait and forward over all ranks.",
                      *spread(per_step("data_wait|forward")(NOW))),
                heatmap("Step time", "Steps per second by their time, of all ranks.",
                        f"mixmae_step_seconds_bucket{HERE}"),
                lines("Communication", Unit.BYTES_PER_SECOND, "Bytes of collectives; counted if the recipe says so.",
                      (rate(f"mixmae_communication_bytes_total{HERE}", "operation"), "$operation")),
                lines("Time of communication", Unit.RATIO, "Share of the ranks' time; counted if the recipe says so.",
                      (f"{rate(f'mixmae_communication_seconds_total{HERE}', 'operation')} / on () group_left ()"
                       f" {rate(f'mixmae_step_seconds_sum{HERE}')}", "$operation")),
            ),
        ),
        Row(
            "Processes",
            (
                lines("Device memory, fullest ranks", Unit.RATIO, "Memory of the device in use, as a share.",
                      (most(lambda window: "max by (node, rank) (avg_over_time(mixmae_device_memory_allocated_bytes"
                            f"{HERE}{window}) / avg_over_time(mixmae_device_memory_limit_bytes{HERE}{window}))"),
                       RANK)),
                lines("Host memory, largest ranks", Unit.BYTES, "Resident memory: what only grows is a leak.",
                      (most(gauge_of(f"mixmae_resident_memory_bytes{HERE}", "node, rank")), RANK)),
                lines("Open files", Unit.COUNT, "Of the ranks' processes: what only grows is a leak.",
                      *spread(f"mixmae_open_files{HERE}")),
            ),
        ),
        Row(
            "Nodes",
            (
                lines("GPU utilization, lowest", Unit.RATIO, "Share of time in which the GPU computed.",
                      (least(gauge_of(f"mixmae_gpu_utilization_ratio{HERE}", "node, gpu")), "GPU $gpu on $node")),
                lines("GPU temperature, highest", Unit.CELSIUS, "A hot GPU lowers its clock and makes all ranks wait.",
                      (most(gauge_of(f"mixmae_gpu_temperature_celsius{HERE}", "node, gpu")), "GPU $gpu on $node")),
                lines("GPU power", Unit.WATTS, "Power that the GPUs draw: lowest, median and highest.",
                      *spread(f"mixmae_gpu_power_watts{HERE}")),
                lines("Host memory available, lowest", Unit.RATIO, "Share of each node's memory.",
                      (least(lambda window: f"max by (node) (avg_over_time(mixmae_node_memory_available_bytes{HERE}"
                             f"{window}) / avg_over_time(mixmae_node_memory_total_bytes{HERE}{window}))"), "$node")),
                lines("Exporters", Unit.COUNT, "Nodes whose exporter answers Prometheus, and nodes that are known.",
                      (f"sum(up{HERE})", "answer"), (f"count(up{HERE})", "known")),
                lines("Scrapes per second", Unit.PER_SECOND, "Scrapes that exporters answered, of all who ask.",
                      *spread(f"rate(mixmae_scrapes_total{HERE}{NOW})")),
            ),
        ),
    ),
)  # fmt: skip
