"""What training would say of the recipe before ranks join."""

import torch

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import complete_checkpoints
from mixmae.trainer.doctor.facts import RecipeFacts
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run.checking import check
from mixmae.trainer.tasks.registry import build_model


def probe_recipe(recipe: Recipe, ranks: Ranks) -> RecipeFacts:
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
    return RecipeFacts(refused, parameters, len(complete_checkpoints(recipe.run_dir)))
