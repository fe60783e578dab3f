"""Reading, waiting for data, and what could not be read."""

from mixmae.monitoring.boards.panels import (
    HERE,
    RANK,
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
)

BOARD = Board(
    "data",
    "Data",
    (
        Row(
            "Reading",
            (
                lines("Bytes read", Unit.BYTES_PER_SECOND, "Bytes of images that all ranks read from shards.",
                      (rate(f"mixmae_read_bytes_total{HERE}"), "read")),
                lines("Images", Unit.PER_SECOND, "Images that the ranks trained on.",
                      (rate(f"mixmae_images_total{HERE}"), "trained on")),
                lines("Bytes per image", Unit.BYTES, "Bytes read for each image that was trained on.",
                      (f"{rate(f'mixmae_read_bytes_total{HERE}')} / {rate(f'mixmae_images_total{HERE}')}", "mean")),
                lines("Data wait of a step, longest", Unit.SECONDS, "The ranks that wait longest for their data.",
                      (most(per_step("data_wait")), RANK)),
                heatmap("Data wait", "Steps per second by the time that they waited for data, of all ranks.",
                        'mixmae_step_part_seconds_bucket{run="$run", node=~"$node", part="data_wait"}'),
                lines("Blocks of remote shards", Unit.PER_SECOND, "Found in the nodes' caches, or fetched.",
                      (rate(f"mixmae_cache_blocks_total{HERE}", "result"), "$result")),
                lines("Batches ready", Unit.COUNT, "Micro-batches ready or being made; at 0 a rank waits.",
                      *spread(f"mixmae_data_queue_batches{HERE}")),
            ),
        ),
        Row(
            "Faults",
            (
                lines("Reads tried again", Unit.PER_SECOND, "The nodes with most.",
                      (most(lambda window: f"sum by (node) (rate(mixmae_read_retries_total{HERE}{window}))"), "$node")),
                lines("Samples replaced", Unit.PER_SECOND, "Samples that could not be used, by reason.",
                      (rate(f"mixmae_replaced_samples_total{HERE}", "reason"), "$reason")),
                lines("Share of samples replaced", Unit.RATIO, "Of the images trained on, since the ranks started.",
                      (f"sum by (reason) (mixmae_replaced_samples_total{HERE}) / on () group_left ()"
                       f" sum(mixmae_images_total{HERE})", "$reason")),
                lines("Free shared memory, lowest", Unit.BYTES, "Data workers pass batches through it.",
                      (least(gauge_of(f"mixmae_shm_free_bytes{HERE}", "node")), "$node")),
            ),
        ),
    ),
)  # fmt: skip
