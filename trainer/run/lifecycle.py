"""A training run from its recipe to its end: check, join, prepare, fit, close."""

from mixmae.base import exit_codes
from mixmae.base.heartbeat import Heartbeat
from mixmae.base.signals import StopRequest
from mixmae.trainer.data.stream import lost_worker_error
from mixmae.trainer.engine import distributed
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run.checking import check
from mixmae.trainer.run.ending import close, fail, say_end
from mixmae.trainer.run.loop import fit
from mixmae.trainer.run.preparing import prepare


def train(
    recipe: Recipe,
    ranks: Ranks,
    stop: StopRequest | None = None,
    heartbeat: Heartbeat | None = None,
    change: bool = False,
) -> int:
    """Trains a recipe from its newest checkpoint, if there is one, to its end or until it is asked to stop.

    Args:
        change: whether the recipe may change what the run computes from here on.

    Returns:
        The exit code, `exit_codes.FINISHED` or `exit_codes.PREEMPTED`.

    Raises:
        UsageError: whatever in the recipe, the shards or the run directory does not fit; most of it is found before the
            process group is joined and a GPU touched.
    """
    job = check(recipe, ranks, change)
    distributed.join(ranks, recipe.launch.stuck_seconds, recipe.train.deterministic)
    run = prepare(job, ranks, stop, heartbeat)
    try:
        begun = run.state.step
        asked_by = fit(run)
        say_end(run, asked_by, begun)
    except BaseException as error:
        lost = lost_worker_error(error, ranks.rank)
        fail(run, lost or error)
        if lost is not None:
            raise lost from error
        raise
    close(run, clean=True)
    return exit_codes.FINISHED if asked_by is None else exit_codes.PREEMPTED
