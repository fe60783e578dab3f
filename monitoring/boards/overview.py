"""One run at a glance."""

from mixmae.monitoring.boards.panels import FIRING, NOW, RUN, Board, Look, Panel, Query, Row, Unit, lines, rate, tile

_WAITING = f'mixmae_step_part_seconds_sum{{run="$run", part="data_wait"}}{NOW}'
_RUNNING = f"count(count by (rank) (time() - mixmae_alive_timestamp_seconds{RUN} < 60))"
_INFO = "recipe, encoder, parameters, world_size, zero_stage, precision, torch, deepspeed, version"

_WHAT_RUNS = Panel(
    "What runs",
    Look.TEXT,
    Unit.NONE,
    "Model, parameters, ranks, recipe and versions. Runs of equal recipes compute the same.",
    (
        Query(
            f"max by ({_INFO}) (mixmae_run_info{RUN})",
            "$encoder, $parameters parameters, $world_size ranks, ZeRO $zero_stage, $precision"
            " (recipe $recipe; torch $torch, DeepSpeed $deepspeed, mixmae $version)",
        ),
    ),
)
_ALERTS = Panel(
    "Firing alerts",
    Look.ALERTS,
    Unit.COUNT,
    "Alerts of this run that fire now, and how often: at 512 ranks one cause may fire hundreds of times.",
    (Query(f"count by (alertname, severity) ({FIRING})", "$alertname ($severity)"),),
)

_NOW = Row(
    "Now",
    (
        _WHAT_RUNS,
        tile("Progress", Unit.RATIO, "Steps done of the steps of the whole run.",
             f"max(mixmae_step{RUN}) / max(mixmae_target_steps{RUN})"),
        tile("Ends", Unit.TIME, "When the run ends at its present rate.",
             f"max(mixmae_estimated_end_timestamp_seconds{RUN})"),
        tile("Epoch", Unit.NONE, "Epochs of data seen.", f"max(mixmae_epoch{RUN})"),
        tile("Loss", Unit.NONE, "Mean loss over all ranks since the last logged step.", f"max(mixmae_loss{RUN})"),
        tile("Images per second", Unit.COUNT, "Of the whole run, since the last logged step.",
             f"max(mixmae_images_per_second{RUN})"),
        tile("MFU", Unit.RATIO, "Share of the devices' peak that the model's operations reach.",
             f"max(mixmae_mfu_ratio{RUN})"),
        tile("Data wait", Unit.RATIO, "Share of the ranks' time in which they wait for data.",
             f"sum(rate({_WAITING})) / {rate(f'mixmae_step_seconds_sum{RUN}')}", 0.1),
        tile("Newest checkpoint", Unit.TIME, "When the newest complete checkpoint was saved.",
             f"max(mixmae_checkpoint_timestamp_seconds{RUN})"),
        tile("Fullest device", Unit.RATIO, "Most memory ever in use, as a share of the device's; the worst rank.",
             f"max(mixmae_device_memory_peak_bytes{RUN} / mixmae_device_memory_limit_bytes{RUN})", 0.95),
        tile("Silent ranks", Unit.COUNT, "Ranks that finished no step for two minutes.",
             f"sum(time() - mixmae_heartbeat_timestamp_seconds{RUN} > bool 120)", 1),
        tile("Missing ranks", Unit.COUNT, "Ranks of which no process runs: stopped, ended, or never there.",
             f"max(mixmae_world_size{RUN}) - ({_RUNNING} or vector(0))", 1),
        tile("Skipped steps", Unit.COUNT, "Steps skipped because a loss or gradient was not finite.",
             f"max(mixmae_skipped_steps_total{RUN})"),
        tile("Falling probe", Unit.COUNT, "Evaluations in a row with the probe a tenth below its highest.",
             'max(mixmae_evaluations_below_highest{run="$run", metric=~"probe_(knn|linear)"})', 3),
        tile("Failed checkpoints", Unit.COUNT, "Checkpoints that could not be saved.",
             f"max(mixmae_checkpoint_failures_total{RUN})", 1),
        tile("Restarts", Unit.COUNT, "Times that the run was started again, whatever ended it before.",
             f"sum(max by (reason) (mixmae_resumes_total{RUN}))"),
        tile("Alerts", Unit.COUNT, "Alerts of this run that fire now.",
             f"count({FIRING}) or vector(0)", 1),
        tile("Up for", Unit.SECONDS, "Since this process of the main rank started to train.",
             f"time() - max(mixmae_start_timestamp_seconds{RUN})"),
    ),
)  # fmt: skip

BOARD = Board(
    "overview",
    "Overview",
    (
        _NOW,
        Row("Alerts", (_ALERTS,)),
        Row(
            "Learning",
            (
                lines("Loss", Unit.NONE, "Mean loss over all ranks, at logged steps.",
                      (f"max(mixmae_loss{RUN})", "loss")),
                lines("Gradient norm", Unit.NONE, "Before clipping, at logged steps.",
                      (f"max(mixmae_gradient_norm{RUN})", "gradient norm")),
                lines("Learning rate", Unit.NONE, "Of the last logged step.",
                      (f"max(mixmae_learning_rate{RUN})", "learning rate")),
                lines("Weight decay", Unit.NONE, "Of the parameters that have one.",
                      (f"max(mixmae_weight_decay{RUN})", "weight decay")),
                lines("Evaluation", Unit.NONE, "What the task measured at its last evaluation, but for the probe.",
                      ('max by (metric) (mixmae_evaluation{run="$run", metric!~"probe_.*"})', "$metric")),
                lines("Probe", Unit.RATIO, "Top-1 accuracy of frozen features on evaluate.probe.shards.",
                      ('max by (metric) (mixmae_evaluation{run="$run", metric=~"probe_(knn|linear)"})', "$metric")),
                lines("Cosine of features", Unit.RATIO, "Mean cosine of two images' features: near 1 they collapsed.",
                      ('max(mixmae_evaluation{run="$run", metric="probe_mean_cosine"})', "mean cosine")),
                lines("Rank of features", Unit.COUNT, "Dimensions that the features use: a fall shows collapse.",
                      ('max(mixmae_evaluation{run="$run", metric="probe_effective_rank"})', "effective rank")),
                lines("Step", Unit.COUNT, "Optimizer step of the run: a drop is a resume from an older checkpoint.",
                      (f"max(mixmae_step{RUN})", "step")),
                lines("Restarts", Unit.COUNT, "Times that the run was started again, by how it had ended.",
                      (f"max by (reason) (mixmae_resumes_total{RUN})", "$reason")),
            ),
        ),
        Row(
            "Speed",
            (
                lines("Images per second", Unit.COUNT, "Of the whole run, at logged steps.",
                      (f"max(mixmae_images_per_second{RUN})", "images/s")),
                lines("Model operations", Unit.FLOPS, "Of the whole run, without recomputation.",
                      (f"max(mixmae_model_flops_per_second{RUN})", "model")),
                lines("MFU", Unit.RATIO, "Share of the devices' peak that the model's operations reach.",
                      (f"max(mixmae_mfu_ratio{RUN})", "MFU")),
                lines("Step time", Unit.SECONDS,
                      "Over all ranks. Quantiles are read from buckets and so are coarse; the mean is exact.",
                      (f"{rate(f'mixmae_step_seconds_sum{RUN}')} / {rate(f'mixmae_step_seconds_count{RUN}')}", "mean"),
                      (f"histogram_quantile(0.5, {rate(f'mixmae_step_seconds_bucket{RUN}', 'le')})", "p50"),
                      (f"histogram_quantile(0.95, {rate(f'mixmae_step_seconds_bucket{RUN}', 'le')})", "p95")),
                Panel("Where the time goes", Look.STACK, Unit.RATIO,
                      "Parts of the ranks' time. Backward and optimizer hold the communication that they wait for.",
                      (Query(f"{rate(f'mixmae_step_part_seconds_sum{RUN}', 'part')} / on () group_left ()"
                             f" {rate(f'mixmae_step_seconds_sum{RUN}')}", "$part"),
                       Query(f"clamp_min(1 - {rate(f'mixmae_step_part_seconds_sum{RUN}')}"
                             f" / {rate(f'mixmae_step_seconds_sum{RUN}')}, 0)", "rest"))),
                lines("Data wait", Unit.RATIO, "Share of time in which ranks wait for data: of all, and of the worst.",
                      (f"sum(rate({_WAITING})) / {rate(f'mixmae_step_seconds_sum{RUN}')}", "all ranks"),
                      (f"max(sum by (rank) (rate({_WAITING}))"
                       f" / {rate(f'mixmae_step_seconds_sum{RUN}', 'rank')})", "worst rank")),
            ),
        ),
        Row(
            "Health",
            (
                lines("Device memory", Unit.RATIO, "Share of the device's memory; the rank with most.",
                      (f"max(mixmae_device_memory_peak_bytes{RUN} / mixmae_device_memory_limit_bytes{RUN})", "peak"),
                      (f"max(mixmae_device_memory_reserved_bytes{RUN} / mixmae_device_memory_limit_bytes{RUN})",
                       "reserved"),
                      (f"max(mixmae_device_memory_allocated_bytes{RUN} / mixmae_device_memory_limit_bytes{RUN})",
                       "in use")),
                lines("Ranks", Unit.COUNT, "Of the run; whose process runs; which finished a step in two minutes.",
                      (f"max(mixmae_world_size{RUN})", "of the run"),
                      (_RUNNING, "running"),
                      (f"sum(time() - mixmae_heartbeat_timestamp_seconds{RUN} <= bool 120)", "stepping")),
                lines("Age of the newest checkpoint", Unit.SECONDS, "What would be lost if the run ended now.",
                      (f"time() - max(mixmae_checkpoint_timestamp_seconds{RUN})", "age")),
            ),
        ),
    ),
)  # fmt: skip
