"""Age, stall, size and failures of checkpoints, and the disk that they need."""

from mixmae.monitoring.boards.panels import RUN, Board, Row, Unit, lines, rate, tile

BOARD = Board(
    "checkpoints",
    "Checkpoints",
    (
        Row(
            "Now",
            (
                tile("Newest", Unit.TIME, "When the newest complete checkpoint was saved.",
                     f"max(mixmae_checkpoint_timestamp_seconds{RUN})"),
                tile("Running since", Unit.TIME, "When this process of the main rank started to train.",
                     f"max(mixmae_start_timestamp_seconds{RUN})"),
                tile("Saved", Unit.COUNT, "Checkpoints saved since then.",
                     f"max(mixmae_checkpoint_seconds_count{RUN})"),
                tile("Failures", Unit.COUNT, "Checkpoints that could not be saved.",
                     f"max(mixmae_checkpoint_failures_total{RUN})", 1),
                tile("Mean stall", Unit.SECONDS, "Time that a step waits for a checkpoint.",
                     f"max(mixmae_checkpoint_seconds_sum{RUN}) / max(mixmae_checkpoint_seconds_count{RUN})"),
                tile("p95 of the stall", Unit.SECONDS, "Read from buckets, and so coarse.",
                     f"histogram_quantile(0.95, max by (le) (mixmae_checkpoint_seconds_bucket{RUN}))"),
                tile("Size", Unit.BYTES, "Of the newest checkpoint.", f"max(mixmae_checkpoint_bytes{RUN})"),
                tile("Room for checkpoints", Unit.COUNT, "How many more of this size fit where the run directory is.",
                     f"floor(min(mixmae_run_dir_free_bytes{RUN}) / max(mixmae_checkpoint_bytes{RUN}))"),
            ),
        ),
        Row(
            "Over time",
            (
                lines("Age", Unit.SECONDS, "Of the newest complete checkpoint.",
                      (f"time() - max(mixmae_checkpoint_timestamp_seconds{RUN})", "age")),
                lines("Time spent on checkpoints", Unit.RATIO, "Share of time in which the main rank's steps wait.",
                      (rate(f"mixmae_checkpoint_seconds_sum{RUN}"), "waiting")),
                lines("Saving", Unit.SECONDS, "Mean time from the start of a save until it is complete.",
                      (f"max(mixmae_checkpoint_write_seconds_sum{RUN}) "
                       f"/ max(mixmae_checkpoint_write_seconds_count{RUN})", "saving")),
                lines("Size of the newest", Unit.BYTES, "All files of one checkpoint.",
                      (f"max(mixmae_checkpoint_bytes{RUN})", "size")),
                lines("Saved and failed", Unit.COUNT, "Since this process of the main rank started.",
                      (f"max(mixmae_checkpoint_seconds_count{RUN})", "saved"),
                      (f"max(mixmae_checkpoint_failures_total{RUN})", "failed")),
                lines("Disk of the run directory", Unit.BYTES, "Free space, and the size of the file system.",
                      (f"min(mixmae_run_dir_free_bytes{RUN})", "free"),
                      (f"min(mixmae_run_dir_size_bytes{RUN})", "size")),
            ),
        ),
    ),
)  # fmt: skip
