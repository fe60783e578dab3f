"""A newcomer's day through the command line: own folders with whatever lies in them, to an encoder in timm.

Every command is one that README or docs name. Each refusal is one line with what to type instead, which the next
command does; nothing shows a traceback, and no error comes twice.
"""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from mixmae.base import jsonl
from mixmae.launch import cli
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.telemetry.events import read_events
from tests.helpers import ROOT, needs_onnx

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
SMALL = [
    "encoder.img_size=64", "encoder.window_size=[4,4,4,2]", "encoder.embed_dim=8", "encoder.depths=[1,1,1,1]",
    "encoder.num_heads=[1,1,2,2]", "train.precision=fp32", "data.num_workers=1", "log.every=1",
]  # fmt: skip
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
CLASSES = {"Hündin": 90, "кошка": 150, "鳥": 210}
"""Names in three scripts, and the red of their images."""


class Day:
    """Runs commands in a folder and keeps what they show."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, *argv: str) -> "subprocess.Popen[str]":
        """Starts a command as a process of its own, as runs need."""
        print(f"$ mixmae {' '.join(argv)}", flush=True)
        return subprocess.Popen(
            [sys.executable, "-m", "mixmae.launch.cli", *argv],
            cwd=self.folder, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def ends(self, process: "subprocess.Popen[str]", code: int) -> list[str]:
        """The lines of a process that ends with a code."""
        shown = process.communicate(timeout=1800)[0]
        return _lines(shown, process.returncode, code)

    def __call__(self, *argv: str, code: int = 0) -> list[str]:
        if argv[0] == "launch":
            return self.ends(self.start(*argv), code)
        print(f"$ mixmae {' '.join(argv)}", flush=True)
        shown = io.StringIO()
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(shown),
            contextlib.redirect_stderr(shown),
            mock.patch.object(sys, "argv", ["mixmae", *argv]),
        ):
            ended = cli.main()
        return _lines(shown.getvalue(), ended, code)

    def refused(self, *argv: str) -> str:
        """The last line of a command that is refused; a run's ranks read its recipe before they refuse it."""
        *before, line = self(*argv, code=2)
        assert all(not said or said.startswith("mixmae: the resolved recipe is ") for said in before)
        return line.removeprefix("mixmae: error: ")


def _lines(shown: str, ended: int, expected: int) -> list[str]:
    """What a command showed: no traceback, no warning of a library, and an error, if it was refused, once."""
    print(shown, flush=True)
    lines = shown.splitlines()
    assert ended == expected, (ended, lines[-3:])
    assert not any("Traceback" in line or "Warning" in line for line in lines)
    errors = [line.partition("mixmae: error: ")[2] for line in lines if "mixmae: error: " in line]
    assert len(errors) == len(set(errors)) == (expected == 2)
    return lines


def photograph(file: Path, number: int, red: int, **options: Any) -> None:
    """Noise with a class's red."""
    pixels = np.random.default_rng(number).integers(0, 90, (80, 96, 3), dtype=np.uint8)
    pixels[..., 0] += np.uint8(red // 2)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **options)


@pytest.fixture
def day(tmp_path: Path) -> Day:
    """photos/train and photos/val with a folder of 12 and 4 images for each class, and what else collects there."""
    number = 0
    for part, images in (("train", 12), ("val", 4)):
        for name, red in CLASSES.items():
            for _ in range(images):
                photograph(tmp_path / "photos" / part / name / f"{number}.jpg", number, red, quality=90)
                number += 1
    train = tmp_path / "photos" / "train"
    for extension in ("tif", "gif", "bmp", "avif", "webp"):
        photograph(train / "Hündin" / f"odd.{extension}", number, CLASSES["Hündin"])
        number += 1
    (tmp_path / "elsewhere").mkdir()
    (train / "кошка").rename(tmp_path / "elsewhere" / "cats")
    (train / "кошка").symlink_to(tmp_path / "elsewhere" / "cats")
    (tmp_path / "elsewhere" / "cats" / "all of them").symlink_to(train)
    whole = (train / "鳥" / "30.jpg").read_bytes()
    (train / "鳥" / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (train / "鳥" / "raw.CR2").write_bytes(b"II*\0")
    (train / "notes.txt").write_text("from the summer")
    return Day(tmp_path)


def test_a_newcomers_day(day: Day) -> None:
    needs_onnx()
    make_shards(day)
    pretrain(day)
    use(day)


def make_shards(day: Day) -> None:
    photos = day.folder / "photos"
    assert f"'mixmae shards build {photos / 'train'} OUT/train' and " in day.refused(
        "shards", "build", "photos", "shards"
    )
    *left_out, summary, skipped, listed = day("shards", "build", "photos/train", "shards/train", "--jobs", "1")
    assert sorted(left_out) == [
        "not used: 1 .CR2 files: 鳥/raw.CR2",
        "not used: 1 .txt files: notes.txt",
        "not used: 1 links back to a folder that they lie in: all of them",
    ]
    assert summary.startswith("shards/train: 41 images, 3 classes, 1 shards, ")
    assert "1 damaged" in skipped
    assert listed == "3 files of the source are no samples; each with its reason in shards/train/skipped.jsonl"
    assert len(jsonl.read(day.folder / "shards" / "train" / "skipped.jsonl", "source", "reason")) == 4
    (summary,) = day("shards", "build", "photos/val", "shards/val", "--jobs", "1")
    assert summary.startswith("shards/val: 12 images, 3 classes, ")
    assert open_index(day.folder / "shards" / "train").classes == tuple(sorted(CLASSES))
    assert day("shards", "check", "shards/train", "--jobs", "1")[-1] == "sound"
    assert "'mixmae shards build photos/train photos-shards/train' and 'mixmae shards build photos/val " in day.refused(
        "recipes", "suggest", "photos", "--gpus", "1"
    )
    assert "shards/train" in day.refused("shards", "check", "shards")
    suggested = day("recipes", "suggest", "shards/train", "--gpus", "1")
    assert "  shards: shards/train" in suggested


def pretrain(day: Day) -> None:
    """Started on two ranks, stopped, and gone on with on one, for longer."""
    command = [
        "launch", "pretrain/demo", "data.shards=[shards/train, shards/val]", "run_dir=run", *SMALL,
        "method.decoder_dim=16", "method.decoder_depth=1", "method.decoder_num_heads=2", "train.global_batch=8",
        "train.micro_batch=2", "log.pictures=null", "optim.warmup=2 steps",
    ]  # fmt: skip
    wrong = day.refused(*command, "--local", "1", "data.shards=photos", "train.duration=9 steps")
    assert "it holds images in parts of a data set; build each on its own: " in wrong
    process = day.start(*command, "--local", "2", "train.duration=5000 steps")
    wait_for_step(day.folder / "run", 3, process)
    process.send_signal(signal.SIGINT)
    stopped = day.ends(process, 85)
    assert any("the same command" in line for line in stopped)
    step = read_events(day.folder / "run", "step")[-1]["step"]
    longer = [*command, "--local", "1", f"train.duration={step + 4} steps"]
    assert "--change goes on with it changed" in day.refused(*longer)
    assert any(f"train.duration (5000 steps then, {step + 4} steps now)" in line for line in day(*longer, "--change"))
    assert read_events(day.folder / "run", "step")[-1]["step"] == step + 4
    assert any("finished already" in line or "already finished" in line for line in day(*longer))


def use(day: Day) -> None:
    day("export", "run", "encoder")
    day("export", "run", "encoder-onnx", "--format", "onnx")
    assert (day.folder / "encoder-onnx" / "model.onnx").exists()
    day("probe", "encoder", "shards/train")
    command = [
        "launch", "finetune/demo", "--local", "1", "encoder.init=encoder", "data.shards=shards/train",
        "evaluate.shards=shards/val", "run_dir=classes", *SMALL, "train.global_batch=8", "train.micro_batch=8",
        "train.duration=2 epochs", "optim.warmup=2 steps", "evaluate.every=1 epoch",
    ]  # fmt: skip
    assert "classification.num_classes=18" in day.refused(*command)
    day(*command, "classification.num_classes=3")
    day("export", "classes", "classifier")
    day("evaluate", "classifier", "shards/val")
    day("predict", "classifier", "photos/val/鳥/44.jpg")
    found = subprocess.run(
        [sys.executable, "-c", "import mixmae, timm; m = timm.create_model('local-dir:encoder', pretrained=True, "
         "features_only=True); print(m.feature_info.channels())"],
        cwd=day.folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True, check=True,
    )  # fmt: skip
    assert (found.stdout, found.stderr) == ("[8, 16, 32, 64]\n", "")


def wait_for_step(run: Path, step: int, process: "subprocess.Popen[str]") -> None:
    while not any(event["step"] >= step for event in read_events(run, "step")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.5)
