"""The best classifier of a linear probe as its encoder's own head, with the normalisation before it folded in."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.models.heads.linear_probe import fold_norm, variants_of
from mixmae.trainer.checkpoints.manifest import Manifest
from mixmae.trainer.checkpoints.weights import saved_buffers
from mixmae.trainer.recipe.schema import Recipe


def linear_head(recipe: Recipe, checkpoint: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`head.fc.weight` and `head.fc.bias`, as an encoder with mean pooling takes them.

    Of the classifiers that see the last stage alone, which such a head sees too, the one with the best top-1 of the
    run's last evaluation.

    Args:
        weights: of the checkpoint, by name.

    Raises:
        UsageError: no classifier sees the last stage alone, or nothing says which is the best.
    """
    variants = variants_of(recipe.linear.stages, recipe.linear.lr_scales)
    candidates = [number for number, variant in enumerate(variants) if variant.stages == 1]
    if not candidates:
        raise UsageError(
            f"{checkpoint}: linear.stages={list(recipe.linear.stages)}, and an exported classifier sees the last stage "
            "alone; probe again with 1 among them"
        )
    metrics = Manifest.read(checkpoint).metrics
    if len(candidates) > 1 and not any(f"top1_{variants[number].name}" in metrics for number in candidates):
        raise UsageError(
            f"{checkpoint}: the run was not evaluated, so that nothing says which of its {len(candidates)} classifiers "
            "is the best; set evaluate.shards"
        )
    best = max(candidates, key=lambda number: metrics.get(f"top1_{variants[number].name}", 0.0))
    buffers = saved_buffers(checkpoint)
    weight, bias = weights[f"heads.{best}.weight"], weights[f"heads.{best}.bias"]
    folded = fold_norm(weight, bias, buffers["norm.mean"], buffers["norm.var"])
    return dict(zip(("head.fc.weight", "head.fc.bias"), folded, strict=True))
