"""DeepSpeed against plain torch, and a run against its interrupted twin: same numbers (two gloo ranks)."""

import copy
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmae.base.run_directory import complete_checkpoints
from mixmae.trainer.checkpoints.weights import master_weights
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.stream import Position, Stream
from mixmae.trainer.data.to_device import ToDevice
from mixmae.trainer.engine import deepspeed_engine
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.engine.parameter_groups import exempt_from_decay, optimizer_groups, parameter_groups
from mixmae.trainer.engine.schedule import build_schedule
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.train import ActivationCheckpointing
from mixmae.trainer.run.checking import check
from mixmae.trainer.run.loop import fit
from mixmae.trainer.run.preparing import prepare
from mixmae.trainer.run.reporting import DivergedError
from mixmae.trainer.tasks.registry import build_model
from mixmae.trainer.telemetry.events import read_events
from tests.helpers import run_ranks, tiny_recipe

pytestmark = pytest.mark.distributed

WORLD_SIZE, STEPS = 2, 8
CPU = torch.device("cpu")
KINDS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


def name(stage: int, precision: str) -> str:
    return f"zero{stage}-{precision}"


def recipe_for(shards: Path, folder: Path, stage: int, precision: str) -> Recipe:
    return tiny_recipe(
        **{
            "data.shards": str(shards),
            "run_dir": str(folder / name(stage, precision)),
            "train.zero_stage": stage,
            "train.precision": precision,
            "optim.clip_grad": 0.05,
            "optim.base_lr": 0.2,
            "encoder.drop_path_rate": 0.2,
            "checkpoint.every": "4 steps",
            "log.pictures": "4 steps",
        }
    )


def train(ranks: Ranks, recipes: list[Recipe]) -> list[dict[str, Any]]:
    """Trains each recipe to its end, one behind the other in the same processes."""
    facts = []
    for recipe in recipes:
        run = prepare(check(recipe, ranks), ranks)
        first = run.state.step
        fit(run)
        positions = run.engine.module.encoder.positions
        facts.append({"first": first, "positions": positions.dtype, "optimizer": type(run.engine.optimizer).__name__})
        run.reporter.close()
        run.engine.destroy()
    return facts


@pytest.fixture(scope="module")
def folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directories of every stage and precision, trained without a break."""
    folder = tmp_path_factory.mktemp("whole")
    for facts in run_ranks(train, WORLD_SIZE, [recipe_for(shards, folder, *kind) for kind in KINDS]):
        assert all(fact["positions"] == torch.float32 for fact in facts)
    return folder


def weights(run_dir: Path) -> dict[str, Tensor]:
    return master_weights(complete_checkpoints(run_dir)[-1])


def losses(run_dir: Path) -> list[float]:
    return [event["loss"] for event in read_events(run_dir, "step")]


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return float(torch.stack([(a[name] - b[name]).detach().norm() for name in a]).norm())


def plain_loop(
    recipe: Recipe, master_dtype: torch.dtype = torch.float32, world_size: int = WORLD_SIZE, device: torch.device = CPU
) -> tuple[list[float], dict[str, Tensor]]:
    """The same training in one process with torch's AdamW on master weights; losses and final weights, on the CPU."""
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    masters = build_model(recipe).to(device, master_dtype)
    model = copy.deepcopy(masters).to(dtype)
    index = open_index(recipe.data.shards)
    schedule = build_schedule(recipe, len(index))
    groups = parameter_groups(masters, recipe.optim.weight_decay, exempt_from_decay(recipe, masters))
    optimizer = torch.optim.AdamW(optimizer_groups(groups, dict(masters.named_parameters())), betas=recipe.optim.betas)
    streams = [Stream(recipe, Ranks(rank, world_size), index, Position(0, 0, "")) for rank in range(world_size)]
    accumulation = recipe.accumulation(world_size)
    means = []
    for step in range(STEPS):
        total = 0.0
        for master in masters.parameters():
            master.grad = torch.zeros_like(master)
        for loss in micro_losses(recipe, model, streams, step, accumulation, device):
            model.zero_grad()
            (loss / (accumulation * world_size)).backward()
            total += loss.item() / (accumulation * world_size)
            for master, parameter in zip(masters.parameters(), model.parameters(), strict=True):
                assert master.grad is not None
                assert parameter.grad is not None
                master.grad += parameter.grad.to(master_dtype)
        torch.nn.utils.clip_grad_norm_(masters.parameters(), recipe.optim.clip_grad or 0.0)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters.parameters(), model.parameters(), strict=True):
                parameter.copy_(master)
        means.append(total)
    return means, {key: parameter.detach().cpu() for key, parameter in masters.named_parameters()}


def micro_losses(
    recipe: Recipe,
    model: torch.nn.Module,
    streams: Sequence[Iterator[Any]],
    step: int,
    accumulation: int,
    device: torch.device,
) -> Iterator[Tensor]:
    from mixmae.models.methods.mixing import draw_mix
    from mixmae.trainer.data.rng import Purpose, seed_at, torch_at

    to_device = ToDevice(device, recipe.data.mean, recipe.data.std)
    for rank, batches in enumerate(streams):
        for micro_step in range(accumulation):
            images = to_device(next(batches).images)
            mix = draw_mix(
                len(images), 2, (2, 2), torch_at(Purpose.INPUTS, recipe.seed, step, rank * accumulation + micro_step)
            )
            torch.manual_seed(seed_at(Purpose.DROP_PATH, recipe.seed, step, rank * accumulation + micro_step))
            yield model(images, *mix.to(device))


def assert_follows_plain_torch(
    recipe: Recipe, loss_off: float, weights_off: float, world_size: int = WORLD_SIZE, device: torch.device = CPU
) -> None:
    """That a run that was made ended as the plain loop does: losses at each step, and weights relative to their way."""
    expected_losses, expected = plain_loop(recipe, world_size=world_size, device=device)
    actual = weights(recipe.run_dir)
    start = dict(build_model(recipe).named_parameters())
    assert actual.keys() == expected.keys()
    assert losses(recipe.run_dir) == pytest.approx(expected_losses, abs=loss_off)
    assert distance(expected, actual) < weights_off * distance(expected, start)
    assert expected_losses[-1] < expected_losses[0] - 100 * loss_off


@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_every_stage_follows_plain_torch(folder: Path, shards: Path, stage: int, precision: str) -> None:
    loss_off, weights_off = (1e-6, 3e-5) if precision == "fp32" else (2e-4, 0.035)
    assert_follows_plain_torch(recipe_for(shards, folder, stage, precision), loss_off, weights_off)


def test_weights_without_fp32_masters_would_be_noticed(folder: Path, shards: Path) -> None:
    """A control for the test above: masters in bf16 end further away than its tolerance."""
    recipe = recipe_for(shards, folder, 2, "bf16")
    _, expected = plain_loop(recipe)
    _, coarse = plain_loop(recipe, torch.bfloat16)
    start = dict(build_model(recipe).named_parameters())
    assert distance(expected, coarse) > 0.035 * distance(expected, start)


def test_interrupted_runs_end_with_the_same_bits(folder: Path, shards: Path, tmp_path: Path) -> None:
    for kind in KINDS:
        whole, part = folder / name(*kind), tmp_path / name(*kind)
        shutil.copytree(whole, part, ignore=shutil.ignore_patterns("step-00000008"))
        (part / "checkpoints" / "newest").write_text("step-00000004\n")
    facts = run_ranks(train, WORLD_SIZE, [recipe_for(shards, tmp_path, *kind) for kind in KINDS])
    assert [fact["first"] for fact in facts[0]] == [4] * len(KINDS)
    for kind in KINDS:
        expected, actual = weights(folder / name(*kind)), weights(tmp_path / name(*kind))
        assert all(torch.equal(value, actual[key]) for key, value in expected.items()), kind
        assert losses(tmp_path / name(*kind))[-4:] == losses(folder / name(*kind))[-4:], kind


def poison(ranks: Ranks, recipes: list[Recipe], from_step: int, until_step: int) -> list[dict[str, Any]]:
    """Trains with images that are not finite on rank 1 alone for some steps."""
    facts = []
    for recipe in recipes:
        run = prepare(check(recipe, ranks), ranks)
        clean = run.to_device

        def spoilt(images: Tensor, run: Any = run, clean: Any = clean) -> Tensor:
            bad = ranks.rank == 1 and from_step <= run.state.step < until_step
            return clean(images) * (torch.nan if bad else 1.0)

        run.to_device = spoilt  # type: ignore[assignment]
        message = ""
        try:
            fit(run)
        except DivergedError as error:
            message = str(error)
        facts.append(
            {
                "state": run.state,
                "message": message,
                "finite": all(p.isfinite().all() for p in run.engine.module.parameters()),
            }
        )
        run.reporter.close()
        run.engine.destroy()
    return facts


def test_non_finite_steps_are_skipped_by_all_ranks(shards: Path, tmp_path: Path) -> None:
    recipes = [recipe_for(shards, tmp_path, *kind) for kind in KINDS]
    for facts in run_ranks(poison, WORLD_SIZE, recipes, 2, 5):
        for fact in facts:
            assert (fact["state"].step, fact["state"].skipped, fact["state"].skipped_in_row) == (STEPS, 3, 0)
            assert fact["finite"]
            assert fact["message"] == ""


def test_too_many_of_them_end_the_run_naming_step_and_samples(shards: Path, tmp_path: Path) -> None:
    recipe = recipe_for(shards, tmp_path, 1, "bf16")
    limited = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_skipped_steps": 3})})
    for facts in run_ranks(poison, WORLD_SIZE, [limited], 2, 8):
        assert "up to step 5" in facts[0]["message"]
        assert "8 samples" not in facts[0]["message"]  # rank 0's were finite
        assert "4 samples" in facts[0]["message"]
        assert ".tar: 00000" in facts[0]["message"]


def test_overlap_changes_no_bit(folder: Path, shards: Path, tmp_path: Path) -> None:
    """A second bucket fills while the first is reduced; in NCCL's case on a stream of its own."""
    recipes = []
    for stage in (2, 3):
        whole = recipe_for(shards, folder, stage, "bf16")
        train_section = whole.train.model_copy(update={"overlap_comm": True})
        recipes.append(whole.model_copy(update={"train": train_section, "run_dir": tmp_path / str(stage)}))
    run_ranks(train_in_small_buckets, WORLD_SIZE, recipes)
    for recipe in recipes:
        expected = weights(folder / name(recipe.train.stage, "bf16"))
        assert all(torch.equal(value, weights(recipe.run_dir)[key]) for key, value in expected.items())


def train_in_small_buckets(ranks: Ranks, recipes: list[Recipe]) -> None:
    deepspeed_engine._BUCKET = 20_000
    train(ranks, recipes)


@pytest.mark.parametrize("stage", [2, 3])
def test_selective_checkpointing_changes_no_bit(folder: Path, shards: Path, tmp_path: Path, stage: int) -> None:
    """Also where parameters are gathered again for what is recomputed."""
    whole = recipe_for(shards, folder, stage, "bf16")
    settings = whole.train.model_copy(update={"activation_checkpointing": ActivationCheckpointing(kind="selective")})
    run_ranks(train, WORLD_SIZE, [whole.model_copy(update={"train": settings, "run_dir": tmp_path})])
    assert losses(tmp_path) == losses(whole.run_dir)
    assert all(torch.equal(value, weights(tmp_path)[key]) for key, value in weights(whole.run_dir).items())
