"""The main job as a user starts it: processes, run directories, and mistakes."""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import timm
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mixmae.base.errors import UsageError, run_cli
from mixmae.base.ownership import hold_run
from mixmae.base.ports import free_port
from mixmae.base.run_directory import complete_checkpoints, newest_checkpoint, newest_step
from mixmae.models import create_encoder
from mixmae.trainer.checkpoints.weights import master_weights
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.engine.schedule import build_schedule
from mixmae.trainer.export.export import main as export
from mixmae.trainer.recipe.loading import load_recipe
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run.checking import check
from mixmae.trainer.run.ending import close
from mixmae.trainer.run.loop import fit
from mixmae.trainer.run.preparing import prepare
from mixmae.trainer.run.provenance import check_run_dir, write_run_dir
from mixmae.trainer.telemetry.events import Events, past_ends, read_events
from mixmae.trainer.train import main
from tests.helpers import ROOT, needs_onnx, run_ranks, tiny_recipe
from tests.warm import run_module

LAUNCH = [sys.executable, "-m", "mixmae.launch.cli", "launch"]


def start(*argv: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    return subprocess.run(
        argv,
        cwd=ROOT,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def recipe_file(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    recipe = tiny_recipe(
        **{
            "data.shards": str(shards),
            "run_dir": str(folder / "run"),
            "train.precision": "bf16",
            "checkpoint.every": "4 steps",
            "log.pictures": "4 steps",
            "checkpoint.keep": 1,
        }
    )
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def finished(recipe_file: Path) -> Path:
    """The run directory of a run of one rank."""
    done = run_module("mixmae.trainer.train", str(recipe_file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 8/8  loss" in done.stdout
    return recipe_file.parent / "run"


@pytest.fixture(scope="module")
def launched(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run under the DeepSpeed launcher on two ranks."""
    run_dir = tmp_path_factory.mktemp("launched") / "run"
    done = start(*LAUNCH, str(recipe_file), "--local", "2", f"run_dir={run_dir}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 8/8  loss" in done.stdout
    return run_dir


def test_a_run_leaves_its_record(finished: Path) -> None:
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert recipe["optim"]["weight_decay"] == 0.05
    assert json.loads((finished / "versions.json").read_text())["torch"] == importlib.metadata.version("torch")
    steps = read_events(finished, "step")
    assert [event["step"] for event in steps] == list(range(1, 9))
    assert all(0.5 < event["loss"] < 2 for event in steps)
    board = EventAccumulator(str(finished / "tensorboard")).Reload()
    assert [s.step for s in board.Scalars("train/loss")] == list(range(1, 9))
    assert [image.step for image in board.Images("reconstructions")] == [1, 4, 8]
    picture = Image.open(finished / "pictures" / "step-00000008.png")
    assert picture.width == 5 * 64 + 4 * 4  # mixed input, two images, two reconstructions
    assert [p.name for p in (finished / "checkpoints").iterdir() if p.is_dir()] == ["step-00000008"]


def test_the_encoder_of_a_run_opens_in_timm(finished: Path, tmp_path: Path) -> None:
    assert export([str(finished), str(tmp_path / "encoder"), "--step", "8"]) == 0
    with pytest.raises(UsageError, match=r"--step 4: .* holds checkpoints of the steps 8$"):
        export([str(finished), str(tmp_path / "other"), "--step", "4"])
    front, card = (tmp_path / "encoder" / "README.md").read_text().removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front)["library_name"] == "timm"
    assert json.loads((finished / "shards.json").read_text())["fingerprint"] in card
    assert "| images in the collection | 54 |" in card
    assert f"| 8 | {read_events(finished, 'step')[-1]['loss']:.4g} |" in card
    shown = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert shown["method"] == yaml.safe_load((finished / "recipe.yaml").read_text())["method"]
    assert str(finished.parent) not in card
    model = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True, num_classes=0)
    weights = master_weights(finished / "checkpoints" / "step-00000008")
    assert all(torch.equal(value, weights[f"encoder.{name}"]) for name, value in model.state_dict().items())
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 64)
    head = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True, num_classes=7)
    assert head(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.distributed
def test_the_encoder_of_a_run_computes_the_same_in_onnxruntime(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_onnx()
    assert export([str(finished), str(tmp_path / "encoder"), "--format", "onnx"]) == 0
    assert f"InferenceSession('{tmp_path / 'encoder' / 'model.onnx'}')" in capsys.readouterr().out
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "encoder" / "model.onnx"))
    model, images = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True), torch.randn(5, 3, 64, 64)
    (features,) = session.run(["features"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(features), model.eval()(images), atol=1e-4, rtol=0)


def test_own_normalisation_travels_with_the_encoder(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    recipe["data"]["mean"] = [0.1, 0.2, 0.3]
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    export([str(copy), str(tmp_path / "encoder")])
    assert timm.create_model(f"local-dir:{tmp_path / 'encoder'}").pretrained_cfg["mean"] == [0.1, 0.2, 0.3]


def test_an_exported_encoder_starts_another_run(finished: Path, recipe_file: Path, tmp_path: Path) -> None:
    export([str(finished), str(tmp_path / "encoder")])
    done = run_module(
        "mixmae.trainer.train",
        str(recipe_file),
        f"run_dir={tmp_path / 'next'}",
        f"encoder.init={tmp_path / 'encoder'}",
        "train.duration=1 step",
        "optim.warmup=0 steps",
        "optim.base_lr=1e-30",
    )
    assert done.returncode == 0, done.stderr
    before = master_weights(finished / "checkpoints" / "step-00000008")
    after = master_weights(tmp_path / "next" / "checkpoints" / "step-00000001")
    # The one step has no length, and DeepSpeed makes its fp32 masters from weights rounded to bf16.
    assert all(
        torch.allclose(value.bfloat16().float(), after[name], rtol=0, atol=1e-20) for name, value in before.items()
    )


@pytest.mark.distributed
@pytest.mark.parametrize(
    "launcher",
    [
        [sys.executable, "-m", "mixmae.trainer.train"],
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            str(free_port()),
            "-m",
            "mixmae.trainer.train",
        ],
    ],
)
def test_every_launcher_gives_the_same_losses(
    launched: Path, recipe_file: Path, tmp_path: Path, launcher: list[str]
) -> None:
    done = start(*launcher, str(recipe_file), f"run_dir={tmp_path / 'run'}", "log.pictures=null")
    assert done.returncode == 0, done.stderr
    expected, actual = ([e["loss"] for e in read_events(d, "step")] for d in (launched, tmp_path / "run"))
    tolerance = 0.05 if "torch.distributed.run" not in launcher else 0.0  # one rank mixes other partners than two do
    assert actual == pytest.approx(expected, abs=tolerance, rel=0)


def test_srun_variables_are_enough(finished: Path, recipe_file: Path, tmp_path: Path) -> None:
    done = run_module(
        "mixmae.trainer.train",
        str(recipe_file),
        f"run_dir={tmp_path / 'run'}",
        "train.duration=3 steps",
        SLURM_PROCID="0",
        SLURM_STEP_NUM_TASKS="1",
        SLURM_LOCALID="0",
        SLURM_JOB_ID=str(os.getpid()),  # of which the port is made
        SLURM_STEP_ID="0",
        MASTER_ADDR="127.0.0.1",
    )
    assert done.returncode == 0, done.stderr
    assert "on 1 cpu ranks" in done.stdout


def test_a_finished_run_has_nothing_left_to_do(finished: Path, recipe_file: Path) -> None:
    done = run_module("mixmae.trainer.train", str(recipe_file))
    assert done.returncode == 0, done.stderr
    assert f"already finished at step 8; next: mixmae export {finished} " in done.stdout
    assert len(read_events(finished, "step")) == 8


def test_a_finished_run_goes_on_for_longer_at_the_new_schedule(
    finished: Path, recipe_file: Path, tmp_path: Path
) -> None:
    """The old and the new recipe give the same warm-up; the extended run goes on where the cosine is then."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    command = ["mixmae.trainer.train", str(recipe_file), f"run_dir={run_dir}", "log.pictures=null"]
    longer = ["train.duration=10 steps", "optim.clip_grad=0.5"]
    with pytest.raises(UsageError, match="--change goes on with it changed") as refused:
        check(load_recipe(recipe_file, [f"run_dir={run_dir}", *longer]), Ranks())
    assert "train.duration (8 steps then, 10 steps now), optim.clip_grad (not set then, 0.5 now)" in str(refused.value)
    done = run_module(*command, *longer, "--change")
    assert done.returncode == 0, done.stderr
    assert "from step 8 on changed: train.duration (8 steps then, 10 steps now), optim.clip_grad" in done.stdout
    (changed,) = read_events(run_dir, "changed")
    assert changed["step"] == 8
    assert changed["changes"] == {"train.duration": ["8 steps", "10 steps"], "optim.clip_grad": [None, 0.5]}
    schedule = build_schedule(load_recipe(recipe_file, longer), 54)
    steps = read_events(run_dir, "step")
    assert [event["step"] for event in steps] == list(range(1, 11))
    assert [event["lr"] for event in steps[8:]] == [schedule.lr(8), schedule.lr(9)]
    again = run_module(*command, *longer)
    assert "already finished at step 10" in again.stdout, again.stderr
    assert len(read_events(run_dir, "changed")) == 1
    shorter = run_module(*command, "train.duration=9 steps", "--change")
    assert shorter.returncode == 2
    assert "train.duration=9 steps ends at step 9, and the run has come to step 10" in shorter.stderr


def test_a_run_that_another_process_has_is_not_started(finished: Path, recipe_file: Path) -> None:
    with hold_run(finished):
        done = run_module("mixmae.trainer.train", str(recipe_file))
        assert done.returncode == 2
        assert f"is in use by process {os.getpid()} on " in done.stderr
        assert run_module("mixmae.trainer.train", str(recipe_file), MIXMAE_RUN_HELD="1").returncode == 0


def test_a_lost_pointer_never_means_starting_over(finished: Path, recipe_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "checkpoints" / "newest").unlink()
    done = run_module("mixmae.trainer.train", str(recipe_file), f"run_dir={copy}")
    assert done.returncode == 0, done.stderr
    assert "newest names no existing checkpoint; using the last complete one; going on from step 8" in done.stdout
    assert "finished at step 8" in done.stdout


def train(ranks: Ranks, recipes: list[Recipe]) -> None:
    """Trains each recipe to its end, one behind the other in the same processes."""
    for recipe in recipes:
        run = prepare(check(recipe, ranks), ranks)
        fit(run)
        close(run, clean=True)


@pytest.mark.distributed
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(recipe_file: Path, tmp_path: Path) -> None:
    """One of two ranks is asked, twice; both stop at the same step, and end with the bits of an undisturbed run."""
    options = ["data.num_workers=1", "checkpoint.every=1000 steps", "log.pictures=null", "train.duration=60 steps"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    command = [*launcher, str(free_port()), "-m", "mixmae.trainer.train", str(recipe_file), *options]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with subprocess.Popen([*command, f"run_dir={parts}"], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        next(line for line in run.stdout if line.startswith("step 3/"))
        (rank,) = [p for p in psutil.Process(run.pid).children() if p.environ()["RANK"] == "1"]
        rank.send_signal(signal.SIGUSR1)
        rank.send_signal(signal.SIGTERM)
        said = run.stdout.read()
    (preempted,) = read_events(parts, "preempted")
    assert 3 < preempted["step"] < 60
    assert newest_step(parts) == preempted["step"]
    # Which of two signals a process notes first is the kernel's to choose.
    assert re.search(rf"stopped at step {preempted['step']} by SIG(USR1|TERM) on rank 1, all saved", said)
    run_ranks(train, 2, [load_recipe(recipe_file, [*options, f"run_dir={run_dir}"]) for run_dir in (whole, parts)])
    expected, actual = (master_weights(complete_checkpoints(run_dir)[-1]) for run_dir in (whole, parts))
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())
    losses = [[event["loss"] for event in read_events(run_dir, "step")] for run_dir in (whole, parts)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 60


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.microbatch=4"], "did you mean 'train.micro_batch'"),
        (["data.shards={tmp}/nowhere"], "does not exist"),
        (["monitoring.auth_file={tmp}/nowhere", "run_dir={tmp}/other"], "monitoring.auth_file="),
        (["monitoring.certfile={tmp}/nowhere", "run_dir={tmp}/other"], "monitoring.certfile="),
        (["data.shards={tmp}"], "holds no .tar files"),
        (["train.global_batch=7"], "does not divide"),
        (["encoder.img_size=96", "run_dir={tmp}/other"], "leave it out, or set encoder.window_size=["),
        (["encoder.img_size=100", "run_dir={tmp}/other"], "nearest that does"),
        (["method.num_images=4", "run_dir={tmp}/other"], "raise it to 4"),
        (["encoder.name=resnet50", "run_dir={tmp}/other"], "unknown encoder"),
        (["encoder.init={tmp}", "run_dir={tmp}/other"], "mixmae export"),
        (["--world-size=3"], "expected world size 3, got 1; refusing to start"),
        (["encoder.init={tmp}"], "another recipe: encoder.init (not set then, {tmp} now)"),
        (["optim.weight_decay=0.1"], "optim.weight_decay (0.05 then, 0.1 now)"),
        (["seed=1", "optim.base_lr=1", "--change"], "another recipe: seed (0 then, 1 now); set what differs as it was"),
        (["optim.warmup=9 steps"], "shorten it"),
        (
            [
                "method.num_images=3",
                "train.micro_batch=4",
                "encoder.img_size=32",
                "encoder.window_size=[8,4,2,1]",
                "run_dir={tmp}/other",
            ],
            "no room for 3 images",
        ),
    ],
)
def test_mistakes_are_one_clear_line(
    finished: Path,
    recipe_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
) -> None:
    argv = [str(recipe_file), *(override.format(tmp=tmp_path) for override in overrides)]
    assert run_cli(main, argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("mixmae: error:")
    assert error.count("\n") == 1
    assert message.format(tmp=tmp_path) in error


SLOW_STARTS = [pytest.param(name, marks=pytest.mark.slow) for name in ("samples", "claimed.json/x")]


@pytest.mark.parametrize("blocked", ["tensorboard", "recipe.yaml/x", *SLOW_STARTS])
def test_a_start_that_fails_ends_all_that_it_started(blocked: str, recipe_file: Path, tmp_path: Path) -> None:
    """A file or folder in the way, some after workers and exporter have started: told, recorded, and no hang."""
    file = tmp_path / "run" / blocked
    file.parent.mkdir(parents=True)
    file.touch()
    options = [f"run_dir={tmp_path / 'run'}", "data.num_workers=1", "log.samples=true", "monitoring.port=0"]
    done = run_module("mixmae.trainer.train", str(recipe_file), *options)
    assert done.returncode == 2
    path = tmp_path / "run" / blocked.removesuffix("/x")
    assert done.stderr.strip().splitlines()[-1].startswith(f"mixmae: error: {path}: ")
    assert "Traceback" not in done.stderr
    assert past_ends(tmp_path / "run") == ["failed"]
    commands = [one.info["cmdline"] or [] for one in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if any(str(tmp_path) in word for word in command)]


def test_half_set_environments_are_one_clear_line(recipe_file: Path) -> None:
    done = run_module("mixmae.trainer.train", str(recipe_file), RANK="1")
    assert done.returncode == 2
    assert "WORLD_SIZE" in done.stderr
    assert "Traceback" not in done.stderr


def test_initial_weights_must_fit(tmp_path: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mixmae.trainer.export.encoder_directory import write_encoder_directory

    write_encoder_directory(
        tmp_path / "encoder", "mixmae_swin_nano", {}, create_encoder("mixmae_swin_nano").state_dict()
    )
    argv = [str(recipe_file), f"run_dir={tmp_path / 'run'}", f"encoder.init={tmp_path / 'encoder'}"]
    assert run_cli(main, argv) == 2
    assert "does not fit the model" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["{tmp}/nowhere", "{tmp}/out"], ["{tmp}", "{tmp}/out"]])
def test_exporting_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert run_cli(export, [a.format(tmp=tmp_path) for a in argv]) == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_checkpoints_are_named_only_when_complete(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "checkpoints" / "partial-00000012").mkdir()
    assert [folder.name for folder in complete_checkpoints(copy)] == ["step-00000008"]
    newest = newest_checkpoint(copy)
    assert newest is not None
    assert newest.name == "step-00000008"


def test_a_history_that_was_given_up_does_not_cost_the_new_one(
    finished: Path, recipe_file: Path, tmp_path: Path
) -> None:
    """Back to step 4 by hand although later ones exist, keep=1: the checkpoints of the new history stay."""
    copy = tmp_path / "run"
    options = [f"run_dir={copy}", "log.pictures=null", "data.num_workers=0"]
    first = run_module("mixmae.trainer.train", str(recipe_file), *options, "checkpoint.keep=3")
    assert first.returncode == 0, first.stderr
    (copy / "checkpoints" / "step-00000008").rename(copy / "checkpoints" / "step-00000099")
    (copy / "checkpoints" / "newest").write_text("step-00000004\n")
    again = run_module("mixmae.trainer.train", str(recipe_file), *options, "checkpoint.keep=1")
    assert again.returncode == 0, again.stderr
    assert [folder.name for folder in complete_checkpoints(copy)] == ["step-00000008"]
    assert [event["step"] for event in read_events(copy, "step")] == list(range(1, 9))


def test_a_run_directory_without_checkpoints_takes_another_recipe(shards: Path, tmp_path: Path) -> None:
    recipe, index = tiny_recipe(run_dir=str(tmp_path / "run")), open_index(shards)
    write_run_dir(recipe, index)
    check_run_dir(tiny_recipe(**{"run_dir": str(tmp_path / "run"), "optim.weight_decay": 0.3}), index)


def test_half_a_line_in_the_record_is_stepped_over(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "step", "step": 1}\n{"event": "step", "st')
    events = Events(tmp_path)
    events.write("step", step=2, loss=float("nan"))
    events.close()
    assert [(event["step"], event.get("loss", 0)) for event in read_events(tmp_path, "step")] == [(1, 0), (2, None)]


@pytest.mark.distributed
def test_mistakes_under_the_launcher_end_with_code_2(recipe_file: Path, tmp_path: Path) -> None:
    command = [*LAUNCH, str(recipe_file), "--local", "2"]
    early = start(*command, f"data.shards={tmp_path / 'nowhere'}")
    assert early.returncode == 2
    assert early.stderr.count("error:") == 1
    late = start(*command, f"run_dir={tmp_path / 'run'}", "encoder.img_size=96")
    assert late.returncode != 0
    assert re.search(r"mixmae: error: encoder\.img_size 96x96 .* \(rank [01] on ", late.stderr)
    assert "Traceback" not in late.stderr


@pytest.mark.distributed
def test_deepspeed_typed_by_hand_never_becomes_a_smaller_run(recipe_file: Path, tmp_path: Path) -> None:
    """DeepSpeed's launcher goes on alone where it finds no hostfile; the number of ranks that is asked for tells."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(tmp_path / "nowhere")]
    run = ["--num_gpus", "1", "--master_port", str(free_port()), "--module", "mixmae.trainer.train", str(recipe_file)]
    done = start(*launcher, *run, f"run_dir={tmp_path / 'run'}", "--world-size=2")
    assert done.returncode != 0
    assert "mixmae: error: expected world size 2, got 1; refusing to start" in done.stderr
    assert not (tmp_path / "run").exists()
