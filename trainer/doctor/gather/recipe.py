"""What training says of the recipe before ranks join."""

import torch

from mixmae.base.errors import UsageError
from mixmae.trainer.checkpoints.layout import complete
from mixmae.trainer.doctor.facts import RecipeFacts
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run.lifecycle import check
from mixmae.trainer.tasks.registry import build_model


def look_at_recipe(recipe: Recipe, ranks: Ranks) -> RecipeFacts:
    """The first reason for which training would refuse to start, and the model's size; no weights are made."""
    with torch.device("meta"):
        refused = ""
        try:
            check(recipe, ranks)
        except UsageError as error:
            refused = str(error)
        try:
            parameters = sum(one.numel() for one in build_model(recipe).parameters())
        except UsageError:  # the model is what is refused
            parameters = None
    return RecipeFacts(refused, parameters, len(complete(recipe.run_dir)))
