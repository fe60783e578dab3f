"""What labelled shards say of each image, in the classes of a model that is evaluated on them."""

import numpy as np
import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.base.redaction import redact
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.integrity import require_labels
from mixmae.trainer.evaluation.frozen_model import FrozenModel
from mixmae.trainer.tasks.labels import flags_of


def truth(index: ShardIndex, model: FrozenModel) -> Tensor:
    """The model's class of each image, int64 [N], or, of a multi-label model, which it has, bool [N, classes].

    Raises:
        UsageError: an image without a label, or a class that the model does not have.
    """
    if model.multi_label:
        where, labels = redact(index.store.location), torch.from_numpy(index.samples["label"].astype(np.int64))
        true = flags_of(index, model.class_names, where)[labels].bool()
        if not true.any():
            raise UsageError(f"no image in {where} has a class; label some by names such as 'cat,sofa'")
        return true
    return _true_classes(index, model)


def _true_classes(index: ShardIndex, model: FrozenModel) -> Tensor:
    """By name where both have names, else by number."""
    where = redact(index.store.location)
    require_labels(index, "mixmae evaluate")
    labels = index.samples["label"].astype(np.int64)
    if index.classes and model.class_names:
        numbers = {name: number for number, name in enumerate(model.class_names)}
        if foreign := [name for n, name in enumerate(index.classes) if name not in numbers and (labels == n).any()]:
            raise UsageError(
                f"{where} has {len(foreign)} classes that {model.name} does not, the first is {foreign[0]!r}; its "
                f"classes are {', '.join(map(repr, model.class_names[:3]))}, ...: build the shards with its names"
            )
        labels = np.array([numbers.get(name, -1) for name in index.classes], dtype=np.int64)[labels]
    elif labels.max() >= model.num_classes:
        raise UsageError(
            f"{index.name_of(int(labels.argmax()))} in {where} has label {labels.max()}, but {model.name} has "
            f"{model.num_classes} classes: expected 0 to {model.num_classes - 1}; correct the label"
        )
    return torch.from_numpy(labels)
