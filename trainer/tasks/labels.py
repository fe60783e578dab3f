"""Labels of shards as a run's classes: which classes there are, and what each image's target is.

A shard set has classes by number, or by name. With `classification.multi_label` a label is a list of names separated by
commas, such as `cat,sofa`; `cat,` and `,` are lists of one name and of none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.trainer.data.index import INVALID_LABEL, ShardIndex, Table
from mixmae.trainer.data.shards.labels import split_classes
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.labelled import Classification
from mixmae.trainer.tasks.classes import listed, shards_with_classes


@dataclass(frozen=True)
class Targets:
    """The targets of a shard set's labels; small and picklable.

    Attributes:
        table: by the label's number in the index: class numbers, int64 [labels], or flags, uint8 [labels, classes].
    """

    table: Tensor

    def __call__(self, labels: Sequence[int] | Table) -> Tensor:
        """int64 [n], or uint8 [n, classes]."""
        return self.table[torch.as_tensor(np.asarray(labels, dtype=np.int64))]


def resolve_classes(recipe: Recipe) -> Recipe:
    """The recipe with its classes: those that it names, or those of `data.shards`.

    Where the shards are out of reach (a plan on another machine), the number of classes that it gives will do.

    Raises:
        UsageError: no classes at all, or another number than the shards name.
    """
    given = recipe.classification
    if given.classes is None:
        if (index := shards_with_classes(recipe, "classification", given.num_classes)) is None:
            return recipe
        given = given.model_copy(update={"classes": _names(index, given.multi_label)})
        if given.num_classes is None and not given.classes:
            labels = index.samples["label"]
            given = given.model_copy(update={"num_classes": max(int(labels.max()) + 1, 0) or None})
        index.store.close()
    if given.classes:
        if given.num_classes not in (None, len(given.classes)):
            raise UsageError(
                f"classification.num_classes={given.num_classes}, but there are {len(given.classes)} classes by name "
                f"({listed(given.classes)}); set it to {len(given.classes)}, or leave it out"
            )
        given = given.model_copy(update={"num_classes": len(given.classes)})
    if given.num_classes is None:
        raise UsageError(
            f"data.shards={recipe.data.where} holds no labels, and task={recipe.task} learns from them; "
            "build the shards from one folder for each class, or put a .cls beside each image"
        )
    return recipe.model_copy(update={"classification": given})


def _names(index: ShardIndex, multi_label: bool) -> tuple[str, ...]:
    if not multi_label:
        return index.classes
    return tuple(sorted({name for combination in index.classes for name in split_classes(combination)}))


def targets_of(index: ShardIndex, classes: Classification, key: str) -> Targets:
    """The targets of a shard set's labels, every one of which was looked at.

    Args:
        classes: of the run, resolved.
        key: of the recipe, which messages name: data.shards, evaluate.shards.

    Raises:
        UsageError: an image without a label, or with one that is no class of the run; only one class.
    """
    where = f"{key}={index.store.location}"
    labels = index.samples["label"]
    _require_labels(index, where)
    used = np.unique(labels)
    if classes.multi_label:
        targets = Targets(flags_of(index, classes.classes or (), where))
        if not (targets.table[used].amin(0) < targets.table[used].amax(0)).any():
            raise UsageError(f"all images in {where} have the same classes; nothing can be learned of them")
        return targets
    numbers = _numbers(index, classes, where)
    if len(np.unique(numbers[used])) < 2:
        raise UsageError(
            f"all {len(index)} images in {where} are of one class, {_name(classes, int(numbers[used][0]))}; "
            "a classifier needs two at least"
        )
    return Targets(torch.from_numpy(numbers))


def _require_labels(index: ShardIndex, where: str) -> None:
    labels = index.samples["label"]
    for wrong, what, change in (
        (labels == INVALID_LABEL, "a label that is no class", f"see 'mixmae shards check {index.store.location}'"),
        (labels < 0, "no label", "put a .cls beside each image, or build the shards without these images"),
    ):
        if wrong.any():
            first = index.name_of(int(np.flatnonzero(wrong)[0]))
            raise UsageError(
                f"{int(wrong.sum())} of {len(labels)} images in {where} have {what}, the first is {first}; {change}"
            )


def _numbers(index: ShardIndex, classes: Classification, where: str) -> Table:
    """The run's class number of each label of the index."""
    assert classes.num_classes is not None, "resolved"
    if index.classes and classes.classes:
        known = {name: number for number, name in enumerate(classes.classes)}
        present = set(np.unique(index.samples["label"]).tolist())
        if foreign := [name for number, name in enumerate(index.classes) if number in present and name not in known]:
            raise UsageError(
                f"{where} has {len(foreign)} classes that the run does not ({listed(foreign)}); its classes are "
                f"{listed(classes.classes)}"
            )
        return np.array([known.get(name, -1) for name in index.classes], dtype=np.int64)
    largest = int(index.samples["label"].max())
    if largest >= classes.num_classes:
        first = index.name_of(int(np.flatnonzero(index.samples["label"] == largest)[0]))
        raise UsageError(
            f"label {largest} in {where} ({first}) is too large for classification.num_classes={classes.num_classes}: "
            f"expected 0 to {classes.num_classes - 1}; set classification.num_classes={largest + 1}, or correct it"
        )
    return np.arange(classes.num_classes, dtype=np.int64)


def flags_of(index: ShardIndex, names: Sequence[str], where: str) -> Tensor:
    """Which of the named classes each label of the index has, uint8 [labels, classes].

    Raises:
        UsageError: an image without a label, labels that are numbers, or a class of another name.
    """
    _require_labels(index, where)
    if not index.classes:
        raise UsageError(
            f"{where} has class numbers, and classification.multi_label=true needs names separated by commas in each "
            ".cls, such as 'cat,sofa'; for one class an image the model is trained with multi_label=false"
        )
    known = {name: number for number, name in enumerate(names)}
    table = torch.zeros(len(index.classes), len(known), dtype=torch.uint8)
    for label in np.unique(index.samples["label"]):
        for name in split_classes(index.classes[label]):
            if name not in known:
                raise UsageError(
                    f"{where} has the class {name!r}, which the model does not; its own are {listed(names)}"
                )
            table[label, known[name]] = 1
    return table


def _name(classes: Classification, number: int) -> str:
    return repr(classes.classes[number]) if classes.classes else str(number)
