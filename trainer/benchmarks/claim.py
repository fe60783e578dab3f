"""`mixmae bench claim`: MixMAE's claim in miniature, at equal pretraining time on one core.

Half a nano Swin is pretrained by each method on the photographs of Fashion-MNIST, enlarged to 48 px; its features are
probed, and it is fine-tuned with 1 % and 10 % of the labels, beside one with random weights. A step of each method is
timed first, in processor time; each then takes as many steps as fit into --seconds. Results are written after each run,
and the same command goes on where it was interrupted. `python -m mixmae.trainer.benchmarks.claim_page` makes the
tables and the picture of docs/claim.md.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mixmae.base.errors import UsageError
from mixmae.base.files import atomic_write
from mixmae.trainer.benchmarks import claim_runs
from mixmae.trainer.benchmarks.results import RESULTS, metadata
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.idx import IdxImages, IdxSource, read_idx_pair
from mixmae.trainer.recipe.arguments import at_least
from mixmae.trainer.recipe.loading import load_recipe
from mixmae.trainer.recipe.schema import Recipe

DATA = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package puts it."""
PACKAGE = "dataset-fashion-mnist"
SHARES = (0.01, 0.1)
"""Of the labels."""
_ROUNDS, _STEPS = 3, 10
"""Of timing: methods take turns."""
_SHARD_BYTES = 64 * 10**6
_WARM_UP = 50


@dataclass(frozen=True)
class Start:
    """What fine-tuning starts from: a pretraining recipe with overrides, or random weights."""

    recipe: str | None
    overrides: tuple[str, ...] = ()


_SEEN = ("method.separate_groups=false", "method.dual=false")
STARTS = {
    "none": Start(None),
    "mixmae": Start("claim/mixmae"),
    "simmim": Start("claim/simmim"),
    "mae": Start("claim/mae"),
    "images_3": Start("claim/mixmae", ("method.num_images=3",)),
    "images_4": Start("claim/mixmae", ("method.num_images=4",)),
    "images_5": Start("claim/mixmae", ("method.num_images=5",)),
    "no_dual": Start("claim/mixmae", ("method.dual=false",)),
    "no_unmixing": Start("claim/mixmae", ("method.separate_groups=false",)),
    "mix_embedding": Start("claim/mixmae", ("method.separate_groups=false", "method.mix_embedding=true")),
    "mask_tokens": Start("claim/mixmae", ("method.extra_mask_ratio=0.5",)),
    **{
        f"fill_{fill}": Start("claim/mixmae", (f"method.fill={fill}", *_SEEN))
        for fill in ("zero", "learnable", "shuffle", "zoomin")
    },
}
"""Those that are compared, and the ablations, by the names of recipes below configs/pretrain/ablation."""
COMPARED = ("none", "mixmae", "simmim", "mae")


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    starts, seeds = _starts(args.starts), _seeds(args.seeds)
    settings = {"pretraining_seconds": args.seconds, "finetune_steps": args.finetune_steps, "held_out": args.held_out}
    claim = Claim(args.out, args.data, settings)
    claim.time_steps([start for start in starts if STARTS[start].recipe is not None])
    for seed in seeds:
        for start in starts:
            claim.run(start, seed)
    if args.json:
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copy(claim.file, RESULTS / "claim.json")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mixmae bench claim", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four IDX files (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/claim"), help="folder for shards, runs and results")
    parser.add_argument("--starts", default=",".join(COMPARED), help=f"from {','.join(STARTS)} (default %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="(default %(default)s)")
    parser.add_argument("--seconds", type=at_least(1), default=100, help="of pretraining (default %(default)s)")
    parser.add_argument("--finetune-steps", type=at_least(1), default=300, help="of 32 images (default %(default)s)")
    parser.add_argument("--held-out", type=at_least(20), default=3000, help="test images (default %(default)s)")
    parser.add_argument("--json", action="store_true", help=f"also write the results to {RESULTS}/claim.json")
    return parser.parse_args(argv)


def _starts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in STARTS:
            raise UsageError(f"--starts {text}: unknown {name!r}; expected {', '.join(STARTS)}")
    return names


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--seeds {text}: expected comma-separated integers, such as 0,1,2") from error


def read_data(folder: Path) -> tuple[IdxImages, IdxImages]:
    """Training and test images.

    Raises:
        UsageError: a file is missing or damaged.
    """
    parts = []
    for part in ("train", "t10k"):
        files = [
            next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)
            for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte")
        ]
        if None in files:
            raise UsageError(
                f"{folder} holds no {part}-images-idx3-ubyte and {part}-labels-idx1-ubyte, gzipped or not; on Debian: "
                f"apt-get install {PACKAGE}, or name the folder of the files with --data"
            )
        parts.append(read_idx_pair(*(file for file in files if file is not None)))
    return parts[0], parts[1]


class Claim:
    """Shards, runs and results in a folder; what is there already is not done again.

    Attributes:
        file: the results: settings, seconds of a step by start, and a record for each run.
    """

    def __init__(self, folder: Path, data: Path, settings: Mapping[str, int]) -> None:
        self.folder, self.file, self._settings = folder, folder / "claim.json", settings
        self._found: dict[str, Any] = {**settings, "step_seconds": {}, "runs": []}
        if self.file.is_file():
            self._found |= json.loads(self.file.read_text())
        if changed := [name for name, value in settings.items() if self._found[name] != value]:
            raise UsageError(
                f"{self.file} holds results of {changed[0]}={self._found[changed[0]]}, and {settings[changed[0]]} is "
                "asked for; name another folder with --out"
            )
        self._train, self._test = read_data(data)

    def time_steps(self, starts: Sequence[str]) -> None:
        """Processor seconds of a step of each start; those that were timed together are compared."""
        times: dict[str, list[float]] = {start: [] for start in starts if start not in self._found["step_seconds"]}
        for _ in range(_ROUNDS if times else 0):
            for start, of_start in times.items():
                recipe = self._pretraining(start, 0, _STEPS, self.folder / "timing" / start)
                of_start.append(claim_runs.alone(claim_runs.step_seconds, recipe, _STEPS))
        for start, of_start in times.items():
            self._found["step_seconds"][start] = round(median(of_start), 4)
            print(f"{start}: {median(of_start):.3f} s a step", flush=True)
        self._write()

    def run(self, start: str, seed: int) -> None:
        """Pretrains with one seed, probes, and fine-tunes with each share of the labels."""
        if STARTS[start].recipe is not None:
            steps = max(1, round(self._settings["pretraining_seconds"] / self._found["step_seconds"][start]))
            recipe = self._pretraining(start, seed, steps, self._pretrained(start, seed))
            self._once("pretrain", start, seed, claim_runs.trained, recipe, steps=steps)
        self._once("probe", start, seed, claim_runs.probed, self._probing(start, seed))
        for share in SHARES:
            kind = f"finetune_{round(100 * share)}"
            recipe = self._finetuning(start, seed, share, self.folder / kind / f"{start}-{seed}")
            self._once(kind, start, seed, claim_runs.trained, recipe)

    def _once(
        self, kind: str, start: str, seed: int, function: Callable[..., Any], recipe: Recipe, **facts: int
    ) -> None:
        """Does a run and writes its record, unless there is one."""
        key = {"kind": kind, "start": start, "seed": seed}
        if any(key.items() <= found.items() for found in self._found["runs"]):
            return
        self._found["runs"].append({**key, **facts, **claim_runs.alone(function, recipe)})
        self._write()
        print(_line(self._found["runs"][-1]), flush=True)

    def _write(self) -> None:
        self._found |= metadata()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.file, json.dumps(self._found, indent=1) + "\n")

    def _pretrained(self, start: str, seed: int) -> Path:
        return self.folder / "pretrain" / f"{start}-{seed}"

    def _pretraining(self, start: str, seed: int, steps: int, run_dir: Path) -> Recipe:
        name = STARTS[start].recipe
        assert name is not None, "random weights are not pretrained"
        shards = self._shards("all", self._train, range(len(self._train.images)))
        own = [f"optim.warmup={min(_WARM_UP, steps // 2)} steps", f"seed={seed}", f"run_dir={run_dir}"]
        return load_recipe(
            Path(name), [*STARTS[start].overrides, *own, f"data.shards={shards}", f"train.duration={steps} steps"]
        )

    def _probing(self, start: str, seed: int) -> Recipe:
        init = [] if STARTS[start].recipe is None else [f"encoder.init={self._pretrained(start, seed)}"]
        overrides = [*STARTS[start].overrides, *init, f"seed={seed}", f"evaluate.probe.shards={self._held_out()}"]
        return load_recipe(Path(STARTS[start].recipe or "claim/mixmae"), overrides)

    def _finetuning(self, start: str, seed: int, share: float, run_dir: Path) -> Recipe:
        per_class = max(1, round(share * len(self._train.images) / self._train.num_classes))
        shards = self._shards(f"labels-{per_class}-{seed}", self._train, self._train.balanced(per_class, seed))
        # From random weights all layers have as much to learn.
        init = ["optim.layer_decay=1.0"]
        if STARTS[start].recipe is not None:
            init = [f"encoder.init={self._pretrained(start, seed)}"]
        steps = self._settings["finetune_steps"]
        own = [f"run_dir={run_dir}", f"seed={seed}", f"classification.num_classes={self._train.num_classes}"]
        own += [f"data.shards={shards}", f"evaluate.shards={self._held_out()}"]
        length = [f"{key}={steps} steps" for key in ("train.duration", "evaluate.every")]
        return load_recipe(Path("claim/finetune"), [*init, *own, *length, f"optim.warmup={max(1, steps // 10)} steps"])

    def _held_out(self) -> Path:
        count = min(self._settings["held_out"], len(self._test.images))
        return self._shards(f"held-out-{count}", self._test, range(count))

    def _shards(self, name: str, images: IdxImages, chosen: Sequence[int]) -> Path:
        out = self.folder / "shards" / name
        if not out.exists():
            build_shards(IdxSource(images, chosen), out, _SHARD_BYTES, seed=0, jobs=1)
        return out


def _line(record: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in record.items()
    )
