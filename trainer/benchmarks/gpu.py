"""`python -m mixmae.trainer.benchmarks.gpu`: the list that `make bench-gpu` measures, a process each."""

import subprocess
import sys

_OURS = "masked,grouped,compiled,triton,compiled-triton"
RUNS = [
    ["--model", "mixmae_swin_base_w14", "--batch", "128", "--variant", f"plain-autocast,{_OURS}"],
    ["--model", "mixmae_swin_huge", "--batch", "32", "--variant", f"plain-autocast,{_OURS},selective,recomputed"],
    ["--model", "mixmae_swin_large", "--batch", "64", "--variant", "plain-autocast,compiled,compiled-triton"],
]
"""K = 2, for which the published operations per image are (722 GFLOP for Swin-H)."""


def main() -> int:
    failed = 0
    for run in RUNS:
        command = [sys.executable, "-m", "mixmae.launch.cli", "bench", "step", *run]
        failed += (
            subprocess.run([*command, "--steps", "10", "--json", "method.num_images=2"], check=False).returncode != 0
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
