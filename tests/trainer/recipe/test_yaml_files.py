"""Recipes that cannot be what was meant: each ends in one line, and in no type of Python's or a library's."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmae.base.errors import UsageError
from mixmae.trainer.recipe.loading import load_recipe, parse_recipe
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.yaml_files import InvalidYamlError, parse_yaml
from mixmae.trainer.tasks.registry import task_of

BOMB = "[x,x,x,x,x,x,x,x,x,x]"
ALIASES = f"seed: [&a {BOMB}" + "".join(
    f", &{new} [{','.join(['*' + old] * 10)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES = {
    "key twice": (b"seed: 1\ntrain: {}\nseed: 2\n", "line 3, column 1: key 'seed' stands here and in line 1"),
    "section twice": (b"train: {micro_batch: 4}\ndata: {}\ntrain: {precision: fp32}\n", "line 3.*'train'.*line 1"),
    "key of a section twice": (b"train:\n  micro_batch: 4\n  micro_batch: 8\n", "line 3, column 3.*line 2"),
    "quoted twice": (b'seed: 1\n"seed": 2\n', "line 2"),
    "deep twice": (b"train: {activation_checkpointing: {kind: none, kind: torch}}", "'kind'"),
    "latin-1": ("run_dir: caf\xe9\n".encode("latin1"), "byte 12 is not UTF-8"),
    "utf-16": ("seed: 1\n".encode("utf16"), "not UTF-8"),
    "tab": (b"train:\n\tmicro_batch: 4\n", "line 2, column 1"),
    "control": (b"run_dir: a\x07b\n", r"U\+0007"),
    "escaped nul": (b'run_dir: "a\\0b"\n', r"U\+0000"),
    "escaped surrogate": (b'run_dir: "\\ud800"\n', r"U\+D800"),
    "deep": (b"[" * 50_000, "nested too deeply"),
    "unclosed": (b"a: [", "line 1"),
    "aliases": (ALIASES.encode() + b"]\n", "aliases stand for more"),
    "recursive list": (b"seed: &a [*a]\n", "aliases stand for more"),
    "recursive section": (b"train: &a {micro_batch: *a}\n", "aliases stand for more"),
    "no such alias": (b"seed: *a\n", "line 1"),
    "huge": (b"# " + b"x" * 2**20, "more than 1048576 bytes"),
    "two documents": (b"seed: 1\n---\nseed: 2\n", "line 2"),
    "list": (b"[1, 2]", r"holds \[1, 2\]; expected sections"),
    "text": (b"seed", "holds 'seed'; expected sections"),
    "number": (b"0", "holds 0; expected sections"),
    "empty list": (b"[]", r"holds \[\]; expected sections"),
    "number as key": (b"1: 2", "'1' is not text"),
    "bool as key": (b"on: 2", "'on' is not text"),
    "list as key": (b"[1, 2]: 2", "not text"),
    "python": (b"seed: !!python/object/apply:os.system [ls]\n", "line 1, column 7: values of type python"),
    "own tag": (b"seed: !mine 3\n", "values of type !mine"),
    "binary": (b"run_dir: !!binary aGVsbG8=\n", "values of type binary"),
    "set": (b"plugins: !!set {a, b}\n", "values of type set"),
    "timestamp": (b"run_dir: !!timestamp 2024-01-01\n", "values of type timestamp"),
    "not a number": (b"seed: !!int one\n", "one is no number"),
    "digits": (b"seed: " + b"9" * 5000, "no number that can be used"),
    "infinite duration": (b"train: {duration: 9e999 steps}\n", "1e.15 at most"),
    "size": (b"data: {cache: {max_bytes: " + b"9" * 400 + b"GB}}\n", "such as 500MB"),
    "size of 30 digits": (b"data: {cache: {max_bytes: " + b"9" * 30 + b"}}\n", "less than or equal"),
    "inf": (b"optim: {base_lr: .inf}\n", r"optim.base_lr=\.inf: expected a finite number"),
    "nan": (b"data: {mean: [.nan, 0, 0]}\n", r"data.mean.0=\.nan: expected a finite number"),
    "nan of a part": (b"method: {mask_ratio: .nan, name: mae}\n", ""),
    "list for a section": (b"train: [1]\n", r"train=\[1\]: expected keys and values below it"),
    "nothing for a section": (b"train:\n", "train=null: expected keys and values below it"),
    "number for text": (b"task: 3\n", "task=3: expected text"),
    "list for a path": (b"run_dir: [a]\n", r"run_dir=\[\"a\"\]: expected a path"),
    "text for a number": (b"seed: one\n", "seed='one': expected a whole number"),
    "fraction": (b"seed: 1.5\n", "seed=1.5: expected a whole number"),
    "yes for a number": (b"data: {num_workers: yes}\n", "data.num_workers=true: expected a number"),
    "no for one of several kinds": (b"data: {streams: no}\n", "data.streams=false: expected a number"),
    "list for a bool": (b"data: {drop_last: [1]}\n", "expected true or false"),
    "list for a switch": (b"train: {compile: [1]}\n", "expected 'auto', true or false"),
    "too many": (b"data: {crop_scale: [0.1, 0.5, 1]}\n", "data.crop_scale=.*: expected at most 2 values, got 3"),
    "too few": (b"data: {crop_scale: [1]}\n", "data.crop_scale"),
    "other channels": (
        b"data: {mean: [1, 2, 3, 4]}\n",
        "mean=.* has 4 values; expected one for each of data.channels=3",
    ),
    "mapping for a list": (b"data: {mean: {a: 1}}\n", "data.mean: expected a list"),
    "component without keys": (b"encoder: 3\n", "encoder=3: expected keys and values"),
    "types of a component": (b"encoder: {depths: {a: 1}}\n", "encoder.depths: expected a list"),
    "one for many": (b"encoder: {depths: 3}\n", "encoder.depths=3: expected a list"),
    "seed": (b"seed: 12345678901234567890123\n", "seed=12345678901234567890123: expected less than"),
    "huge number": (b"train: {micro_batch: 100000000000}\n", "less than or equal"),
    "huge image": (b"encoder: {img_size: 1000000000}\n", "less than or equal"),
    "timeout": (b"launch: {stuck_seconds: 1e300}\n", "less than or equal"),
}
"""What stands in a file, and what is said of it."""
FOREIGN = re.compile(r"Traceback|pydantic|datetime|dictionary|tuple|instance of|<class|constructor|b'|None|True|\n")


@pytest.mark.parametrize("case", FILES)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, case: str) -> None:
    content, message = FILES[case]
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        task_of(load_recipe(file))
    words = str(caught.value)
    assert re.search(message, words), words
    assert not FOREIGN.search(words), words
    assert len(words) < 500


def test_dates_marks_and_merged_sections_are_read(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xef\xbb\xbfrun_dir: 2024-01-01\ndata: &a {hflip: 0.0}\nevaluate: {shards: 12-31}\n")
    assert load_recipe(file).run_dir == Path("2024-01-01")
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}") == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}
    file.write_bytes(b"")
    assert load_recipe(file) == Recipe()


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_PLACES = ["seed", "run_dir", "task", "train", "train.duration", "train.micro_batch", "data.mean", "data.crop_scale"]
_PLACES += ["encoder", "encoder.depths", "method.name", "optim.betas", "data.cache.max_bytes", "plugins", "log.wandb"]


def said(function: Callable[[], object], error: type[Exception]) -> str:
    """What a refusal says; nothing where there is none."""
    try:
        function()
    except error as refused:
        return str(refused)
    return ""


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(_PLACES), _VALUES)
def test_any_value_anywhere_is_taken_or_explained(place: str, value: object) -> None:
    *sections, key = place.split(".")
    content: dict[str, object] = {key: value}
    for section in reversed(sections):
        content = {section: content}
    words = said(lambda: parse_recipe(content, "recipe"), UsageError)
    assert not re.search(r"Traceback|pydantic|dictionary|instance of|<class|\n", words)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet=" \t\n:-[]{}&*!|>'\"%@#,?ab01.", max_size=40))
def test_any_bytes_are_a_value_or_one_line(content: bytes | str) -> None:
    assert "\n" not in said(lambda: parse_yaml(content), InvalidYamlError)


def test_an_override_below_a_value_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("train: 3\n")
    with pytest.raises(UsageError, match="train is 3 in the recipe"):
        load_recipe(file, ["train.micro_batch=4"])
