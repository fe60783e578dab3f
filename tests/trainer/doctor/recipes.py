"""A small recipe as a file, for jobs that read one."""

from pathlib import Path

_TEXT = """
run_dir: {run_dir}
encoder: {{name: mixmae_swin_nano, img_size: 96, window_size: [12, 12, 6, 3]}}
method: {{num_images: 2, decoder_dim: 64, decoder_depth: 4, decoder_num_heads: 4}}
data: {{shards: {shards}, num_workers: 1}}
train: {{duration: 20 steps, global_batch: 8, micro_batch: 2}}
optim: {{warmup: 2 steps}}
"""


def write_recipe(file: Path, run_dir: Path, shards: Path) -> Path:
    """1.9 M parameters; for 1, 2 or 4 ranks."""
    file.write_text(_TEXT.format(run_dir=run_dir, shards=shards))
    return file
