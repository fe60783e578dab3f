"""How good a classifier is on held-out images, while it is trained."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmae.models.heads.classification import Classifier
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.to_device import ToDevice
from mixmae.trainer.engine.distributed import Ranks, all_reduce_sum
from mixmae.trainer.evaluation.held_out import evaluation_crop, held_out_batches
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.labels import Targets


def evaluate_classifier(
    classifier: Classifier,
    index: ShardIndex,
    targets: Targets,
    recipe: Recipe,
    ranks: Ranks,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """`val_loss` on hard labels and `top1`, `top5` (shares of the images), or, of several labels an image, `f1`.

    All ranks call it together; every image counts once.

    Raises:
        UsageError: an image cannot be read.
    """
    to_device = ToDevice.of(ranks.device, recipe.data)
    count_of = _multi_label_sums if classifier.multi_label else _single_label_sums
    total = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    size, batch, threads = recipe.encoder.img_size, recipe.train.micro_batch, recipe.data.num_workers
    batches = held_out_batches(index, size, batch, ranks, evaluation_crop(recipe), threads, beat, recipe.data.pixels)
    for images, samples, _ in batches:
        logits = classifier(to_device(images))[: len(samples)]
        true = targets(index.samples["label"][list(samples)]).to(ranks.device, non_blocking=True)
        total += count_of(logits, true)
    if classifier.multi_label:
        loss, correct, wrong, images_seen = all_reduce_sum(total).tolist()
        return {"val_loss": loss / images_seen, "f1": 2 * correct / max(1.0, 2 * correct + wrong)}
    loss, first, among_five, images_seen = all_reduce_sum(total).tolist()
    return {"val_loss": loss / images_seen, "top1": first / images_seen, "top5": among_five / images_seen}


def _single_label_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over images: loss, right ones at first place and among five, and how many there are."""
    best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    count = torch.full_like(loss, len(labels))
    return torch.stack([loss, best[:, 0].sum(), best.sum(), count]).double()


def _multi_label_sums(logits: Tensor, flags: Tensor) -> Tensor:
    """Sums: loss of images, classes rightly given, classes wrongly given or missed, and how many images there are."""
    given, true = logits > 0, flags.bool()
    loss = F.binary_cross_entropy_with_logits(logits, flags.float(), reduction="none").mean(1).sum()
    count = torch.full_like(loss, len(flags))
    return torch.stack([loss, (given & true).sum(), (given ^ true).sum(), count]).double()
