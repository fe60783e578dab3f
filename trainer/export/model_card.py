"""The model card of an exported encoder: a README.md that says how to open it, and what it was trained on and by."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mixmae.base.image_size import shown_size
from mixmae.base.redaction import redact_all
from mixmae.trainer.checkpoints.manifest import Manifest
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.telemetry.events import read_events

_LOSSES = 10
"""Rows of the table of losses."""
_SECTIONS = ("seed", "encoder", "method", "data", "train", "optim")
_OF_TASKS = ("task", "detection", "segmentation")
"""Shown where they say something."""
_WHOLE = {"detect": ("object-detection", "Mask R-CNN"), "segment": ("image-segmentation", "UperNet")}
"""Kinds of models that are exported as a whole, by task."""
_PRIVATE = {"data": ("shards", "network", "cache", "num_workers", "prefetch_factor"), "encoder": ("init",)}
"""Keys that say where things lie here, and nothing of the weights."""


def model_card(recipe: Recipe, manifest: Manifest, run_dir: Path) -> str:
    """The card of a checkpoint of a run, in Markdown with the front matter that model hubs read."""
    parts = _head(recipe), _training(manifest), _losses(run_dir, manifest.step), _recipe(recipe), _licence(recipe)
    return "".join(f"{line}\n" for part in parts for line in part)


def _head(recipe: Recipe) -> Iterator[str]:
    if recipe.task in _WHOLE:
        yield from _head_of_whole(recipe)
        return
    encoder, classes = recipe.encoder, recipe.classification.num_classes
    kind = "image-feature-extraction" if classes is None else "image-classification"
    yield from ("---", "library_name: timm", "tags:", "- timm", f"- {kind}", "- mixmae", "---")
    by = f"pretrained by {recipe.method.name}" if classes is None else f"trained on {classes} classes"
    yield from (f"# {encoder.name}, {by}", "", f"Weights in fp32, for images of {shown_size(encoder.img_size)} px.", "")
    yield from ("```python", "import mixmae, timm  # mixmae registers the architectures", "")
    own = ", num_classes=10" if classes is None else ""
    yield f"model = timm.create_model('local-dir:PATH_OF_THIS_DIRECTORY', pretrained=True{own})"
    yield from ("```", "")


def _head_of_whole(recipe: Recipe) -> Iterator[str]:
    kind, what = _WHOLE[recipe.task]
    yield from ("---", "library_name: mixmae", "tags:", f"- {kind}", "- mixmae", "---")
    yield from (f"# {what} on {recipe.encoder.name}", "")
    yield from (f"Weights in fp32, for images of {shown_size(recipe.encoder.img_size)} px.", "")
    yield from ("```sh", "mixmae predict PATH_OF_THIS_DIRECTORY IMAGE ... --out FOLDER", "```", "")


def _training(manifest: Manifest) -> Iterator[str]:
    samples = manifest.state["samples"]
    rows = {
        "optimizer steps": f"{manifest.step:,}",
        "images in the collection": f"{round(samples / manifest.epoch):,}" if manifest.epoch else "unknown",
        "images seen": f"{samples:,} ({manifest.epoch:.4g} epochs)",
        "fingerprint of the images and their order": f"`{manifest.position['fingerprint']}`",
        "loss at the last logged step": "not finite" if manifest.loss is None else f"{manifest.loss:.4g}",
        **{name: f"{value:.4g}" for name, value in manifest.metrics.items()},
        "ranks": f"{manifest.world_size}, ZeRO {manifest.zero_stage}",
        "software": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    yield from ("## Training", "", *_table(("", ""), rows.items()), "")


def _losses(run_dir: Path, last: int) -> Iterator[str]:
    steps = [event for event in read_events(run_dir, "step") if event["step"] <= last and event.get("loss") is not None]
    shown = [steps[round(row * (len(steps) - 1) / (_LOSSES - 1))] for row in range(_LOSSES)] if steps else []
    rows = {f"{event['step']:,}": f"{event['loss']:.4g}" for event in shown}
    yield from ("## Loss", "", *_table(("step", "mean loss since the last logged step"), rows.items()), "")


def _recipe(recipe: Recipe) -> Iterator[str]:
    content = redact_all(recipe.model_dump(mode="json"))
    told = [name for name in _OF_TASKS if name in content and getattr(recipe, name) != getattr(Recipe(), name)]
    shown = {name: _public(name, content[name]) for name in (*_SECTIONS, *told)}
    yield from ("## Recipe", "", "```yaml", yaml.safe_dump(shown, sort_keys=False).rstrip(), "```", "")


def _public(name: str, section: Any) -> Any:
    if not isinstance(section, Mapping):
        return section
    return {key: value for key, value in section.items() if key not in _PRIVATE.get(name, ())}


def _licence(recipe: Recipe) -> Iterator[str]:
    yield from ("## Licence", "")
    yield "The weights belong to whoever trained them: mixmae, which is under Apache-2.0, makes no claim on them."
    yield "Whoever publishes them writes here under which licence, and sees what the licences of the images allow."
    if recipe.encoder.init is not None:
        yield f"They began as those of `{Path(recipe.encoder.init).name}`, whose licence goes with them."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells)} |"
