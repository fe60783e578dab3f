from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mixmae.base.errors import UsageError
from mixmae.trainer.recipe.loading import load_recipe, parse_recipe, upgrade
from mixmae.trainer.recipe.resume_rules import recipe_id
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.units import Span
from mixmae.trainer.tasks.registry import task_of


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text("method: {num_images: 2}\ntrain: {duration: 3 epochs}\n")
    return file


def test_overrides_stand_above_the_file_and_the_file_above_defaults(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["train.micro_batch=64", "optim.base_lr=1e-3", "encoder.depths=[1,1,2,1]"])
    assert recipe.method.settings["num_images"] == 2
    assert recipe.train.micro_batch == 64
    assert recipe.optim.base_lr == 1e-3
    assert recipe.encoder.settings == {"depths": [1, 1, 2, 1]}
    assert recipe.train.global_batch == 1024


def test_an_address_may_be_written_as_in_a_url(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ['monitoring.address="[::1]"']).monitoring.address == "::1"


def test_a_resolved_recipe_reads_back_the_same(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["log.pictures=null", "checkpoint.every=1234567 samples"])
    assert parse_recipe(yaml.safe_load(recipe.to_yaml()), "") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.microbatch=4", "did you mean 'train.micro_batch'"),
        ("zero_stage=2", "did you mean 'train.zero_stage'"),
        ("encoder.embed=3", "did you mean 'encoder.embed_dim'"),
        ("nothing_like_it=1", "known: run_dir, seed, task"),
        ("train.duration=3 weeks", "such as '40 epochs'"),
        ("train.zero_stage=4", "train.zero_stage=4"),
        ("train.zero_stage=0", "use zero_stage=1"),
        ("train.micro_batch=1", "raise it to 2"),
        ("method.num_images=6", "expected 2 to 5"),
        ("train.activation_checkpointing.cpu_offload=true", "kind=fairscale only"),
        ("train.micro_batch", "key.path=value"),
        ("encoder.depths=[1,2", "close its brackets"),
        ("encoder.window_size=[0,4,4,2]", "greater than 0"),
        ("optim.betas=[2,3]", "less than 1"),
        ("data.crop_scale=[1.0,0.2]", "low <= high"),
        ("data.std=[0,1,1]", "greater than 0"),
        ("encoder.img_size=[64]", "encoder.img_size"),
        ("encoder.img_size=[64,0]", "greater than 0"),
        ("encoder.img_size=[224,100]", "224x100 does not divide into cells of 32 px"),
    ],
)
def test_mistakes_are_explained(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        task_of(load_recipe(recipe_file, [override])).check()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 3, "compile": True},
        {"compile": True, "activation_checkpointing": {"kind": "fairscale"}},
    ],
)
def test_wrong_combinations_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="compile=true"):
        parse_recipe({"train": settings}, "")


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", None])
def test_files_that_are_no_recipe(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "r.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=r"r\.yaml"):
        load_recipe(file)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 2048))
def test_accumulation_divides_the_global_batch(world_size: int, micro_batch: int, global_batch: int) -> None:
    recipe = Recipe.model_validate({"train": {"micro_batch": micro_batch + 4, "global_batch": global_batch}})
    if global_batch % ((micro_batch + 4) * world_size):
        with pytest.raises(UsageError, match="would"):
            recipe.accumulation(world_size)
    else:
        assert recipe.accumulation(world_size) * (micro_batch + 4) * world_size == global_batch


def test_spans() -> None:
    assert Span(40, "epoch").steps(1_281_167, 1024) == round(40 * 1_281_167 / 1024)
    assert Span(5e6, "sample").steps(10, 1000) == 5000
    assert Span(7, "step").steps(10, 1000) == 7


def test_a_square_is_the_same_written_as_two_sides(recipe_file: Path) -> None:
    square, rectangle = (load_recipe(recipe_file, [f"encoder.img_size={sides}"]) for sides in ("[96,96]", "[64,128]"))
    assert square.encoder.img_size == 96
    assert rectangle.encoder.img_size == (64, 128)
    assert rectangle.image_shape == (3, 64, 128)
    assert parse_recipe(yaml.safe_load(rectangle.to_yaml()), "") == rectangle


def test_recipes_that_compute_the_same_have_one_name(recipe_file: Path) -> None:
    def name(*overrides: str) -> str:
        return recipe_id(load_recipe(recipe_file, overrides))

    assert name() == name("run_dir=elsewhere", "log.every=7", "train.zero_stage=2", "data.cache.dir=/tmp")
    assert len({name(), name("seed=1"), name("data.hflip=0"), name("optim.base_lr=1e-3")}) == 4


def test_older_keys_are_named_by_their_new_names(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    for content, message in (
        ("model: {encoder: mixmae_swin_base}", "'model.encoder' is now called 'encoder.name'"),
        ("model: {sizes: {depths: [1, 1, 1, 1]}}", "'model.sizes.depths' is now called 'encoder.depths'"),
        ("model: {num_images: 2}", "'model.num_images' is now called 'method.num_images'"),
        ("data: {window: 3}", "'data.window' is now called 'data.shuffle_window'"),
    ):
        file.write_text(content)
        with pytest.raises(UsageError, match=message):
            load_recipe(file)


def test_a_recipe_of_an_older_version_is_upgraded() -> None:
    sizes = {"embed_dim": None, "depths": [1, 1, 2, 1], "num_heads": None, "window_size": None, "drop_path_rate": 0.1}
    model = {"encoder": "mixmae_swin_nano", "sizes": sizes, "img_size": 96, "num_images": 2, "dual": True, "init": None}
    old = {
        "model": model,
        "data": {"max_bad_share": 0.2, "window": 8},
        "optim": {"no_decay": ["relative_position_bias_table", "mask_token"]},
    }
    recipe = parse_recipe(upgrade(old), "old")
    assert recipe.encoder.name == "mixmae_swin_nano"
    assert recipe.encoder.settings == {"depths": [1, 1, 2, 1], "drop_path_rate": 0.1}
    assert recipe.method.settings == {"num_images": 2, "dual": True}
    assert (recipe.data.max_corrupt_fraction, recipe.data.shuffle_window) == (0.2, 8)
    assert recipe.optim.no_decay is None
