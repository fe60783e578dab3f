"""A classifier, or an encoder's neighbours, scored on labelled images: every one counted exactly once, on any ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mixmae.base.heartbeat import Heartbeat
from mixmae.base.redaction import redact
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.evaluation.frozen_model import FrozenModel
from mixmae.trainer.evaluation.held_out import HeldOut, gather_rows, held_out_batches
from mixmae.trainer.evaluation.knn import Bank, nearest, ranking
from mixmae.trainer.evaluation.multi_label_score import MultiLabelScore
from mixmae.trainer.evaluation.score import Score
from mixmae.trainer.evaluation.truth import truth

NEIGHBOURS = (10, 20, 100, 200)
_WORST = 10
_NAMES = {"top1": "top-1", "top5": "top-5", "mAP": "mAP", "f1": "F1"}


@dataclass(frozen=True)
class Settings:
    """How images are read on each rank."""

    batch: int
    threads: int
    heartbeat: Heartbeat

    def batches(self, index: ShardIndex, model: FrozenModel, ranks: Ranks) -> Iterator[HeldOut]:
        def beat() -> None:
            self.heartbeat.set_phase("evaluation")

        return held_out_batches(
            index, model.size, self.batch, ranks, model.crop_ratio, self.threads, beat, model.pixels
        )


def score_model(
    model: FrozenModel, index: ShardIndex, bank_index: ShardIndex | None, settings: Settings, ranks: Ranks
) -> tuple[Score | MultiLabelScore | None, dict[int, Score]]:
    """The classifier's score, if it has a head, and those of k nearest neighbours by k; the same on every rank.

    Args:
        bank_index: labelled images whose features are the known ones; None for no neighbours.
    """
    own, answers = model.run(settings.batches(index, model, ranks))
    total, score, neighbours = len(index), None, {}
    if model.num_classes:
        answers, true = gather_rows(answers, total, ranks).cpu(), truth(index, model)
        score = MultiLabelScore(answers, true) if model.multi_label else Score(answers, true, model.num_classes)
    if bank_index is not None:
        true = torch.from_numpy(index.samples["label"].astype(np.int64))
        known = torch.from_numpy(bank_index.samples["label"].astype(np.int64))[ranks.rank :: ranks.world_size]
        features, _ = model.run(settings.batches(bank_index, model, ranks))
        found = nearest(
            Bank(features, known.to(features.device)), gather_rows(own, total, ranks), max(NEIGHBOURS), ranks
        )
        classes = int(max(true.max(), bank_index.samples["label"].max())) + 1
        for k in [k for k in NEIGHBOURS if k <= len(bank_index)] or NEIGHBOURS[:1]:
            neighbours[k] = Score(ranking(found, k, classes, min(5, classes)).cpu(), true, classes)
    return score, neighbours


def figures(
    model: FrozenModel, index: ShardIndex, score: Score | MultiLabelScore | None, neighbours: dict[int, Score]
) -> dict[str, Any]:
    """Everything that was measured, as JSON holds it."""
    found: dict[str, Any] = {"model": model.name, "shards": redact(index.store.location), "images": len(index)}
    if score is not None:
        found |= score.figures(model.describe)
    if neighbours:
        found["knn"] = {str(k): {"top1": of_k.top(1), "top5": of_k.top(5)} for k, of_k in neighbours.items()}
    return found


def report(found: dict[str, Any], ranks: Ranks) -> None:
    print(f"{found['images']} images of {found['shards']} on {ranks.world_size} {ranks.device.type} ranks")
    for figure, name in _NAMES.items():
        if figure in found:
            print(f"{name:6} {found[figure]:7.2%}")
    for k, of_k in found.get("knn", {}).items():
        print(f"kNN    {of_k['top1']:7.2%}   k={k}")
    classes = found.get("per_class", [])
    if len(classes) > 1:
        figure = "AP" if "mAP" in found else "top1"
        mean = sum(one[figure] for one in classes) / len(classes)
        print(f"mean of {len(classes)} classes {mean:.2%}; least recognised:")
        for one in sorted(classes, key=lambda one: one[figure])[:_WORST]:
            print(f"  {one[figure]:7.2%}  of {one['images']:5} images  {one['name']}")
