"""Recipes that build on others."""

from pathlib import Path

import pytest

from mixmae.base.errors import UsageError
from mixmae.trainer.recipe.loading import load_recipe


def write(folder: Path, **recipes: str) -> dict[str, Path]:
    """Writes recipes, which may name each other's files."""
    files = {name: folder / f"{name}.yaml" for name in recipes}
    for name, text in recipes.items():
        files[name].write_text(text.format(**files))
    return files


def test_a_recipe_says_what_it_changes_of_its_base_and_overrides_come_last(tmp_path: Path) -> None:
    files = write(
        tmp_path,
        far="train: {{duration: 300 epochs, micro_batch: 64}}\nmethod: {{num_images: 2, dual: false}}\nseed: 1\n",
        near="base: {far}\nmethod: {{num_images: 3}}\nseed: 2\n",
        own="base: {near}\ntrain: {{micro_batch: 32}}\n",
    )
    recipe = load_recipe(files["own"], ["seed=3"])
    assert (str(recipe.train.duration), recipe.train.micro_batch, recipe.seed) == ("300 epochs", 32, 3)
    assert recipe.method.settings == {"num_images": 3, "dual": False}
    flat = write(tmp_path, flat="train: {{duration: 300 epochs, micro_batch: 32}}\nseed: 3\n")["flat"]
    assert load_recipe(flat, ["method.num_images=3", "method.dual=false"]) == recipe


def test_another_encoder_or_method_has_none_of_the_bases_settings(tmp_path: Path) -> None:
    own = write(tmp_path, own="base: pretrain/simmim/swin_base\nencoder: {{name: mixmae_pvt_large}}\n")["own"]
    recipe = load_recipe(own)
    assert recipe.encoder.settings == {}
    assert recipe.encoder.img_size == 224
    assert recipe.method.settings == {"mask_ratio": 0.6}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: pretrain/swin_hug\n", "did you mean 'pretrain/swin_huge'"),
        ("base: 3\n", "base is 3; expected a recipe's name or file"),
        ("base: {own}\n", "builds on"),
        ("base: {other}\n", "without an end"),
    ],
)
def test_bases_that_lead_nowhere_are_refused(tmp_path: Path, text: str, message: str) -> None:
    files = write(tmp_path, own=text, other="base: {own}\n")
    with pytest.raises(UsageError, match=message) as raised:
        load_recipe(files["own"])
    assert "\n" not in str(raised.value)


def test_a_base_is_no_key_of_an_override(tmp_path: Path) -> None:
    own = write(tmp_path, own="seed: 1\n")["own"]
    with pytest.raises(UsageError, match="unknown key 'base'"):
        load_recipe(own, ["base=pretrain/swin_huge"])
