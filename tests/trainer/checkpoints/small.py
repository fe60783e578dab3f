"""A small module with a frozen part and batch statistics, and what trains, saves and resumes it without a run."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmae.models.contract import Trainable
from mixmae.trainer.checkpoints.manifest import Progress
from mixmae.trainer.checkpoints.resume import resume
from mixmae.trainer.checkpoints.saver import Saver
from mixmae.trainer.engine.deepspeed_engine import deepspeed_config
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.engine.optimizer import OptimizerChoice, build_optimizer
from mixmae.trainer.engine.parameter_groups import set_lr
from mixmae.trainer.recipe.schema import Recipe

GLOBAL_BATCH, MICRO_BATCH, WEIGHT_DECAY, CLIP_GRAD = 16, 4, 0.05, 0.5


class Small(Trainable):
    """Sizes are odd, so that ranks' shares end within parameters."""

    def __init__(self, frozen: bool = True, affine: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 7).requires_grad_(not frozen)
        self.body = nn.Linear(7, 9, bias=False)
        self.norm = nn.BatchNorm1d(9, affine=affine)
        self.head = nn.Linear(9, 3)
        self.register_buffer("constant", torch.ones(3), persistent=False)

    def forward(self, images: Tensor, *inputs: Tensor) -> Tensor:
        """Of vectors in place of images, and labels."""
        (labels,) = inputs
        dtype = self.stem.weight.dtype
        x = self.body(F.gelu(self.stem(images.to(dtype))))
        logits = self.head(F.gelu(self.norm(x.float())).to(dtype))
        return F.cross_entropy(logits.float() * self.constant, labels)

    def block_groups(self) -> dict[str, list[nn.Module]]:
        return {}

    def set_grad_checkpointing(self, groups: Collection[str]) -> None:
        assert not groups


def batch_at(step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
    """Inputs [4, 6] and labels [4] of a micro-batch of a step's global batch."""
    generator = torch.Generator().manual_seed(1000 * step + micro_batch)
    return torch.randn(4, 6, generator=generator), torch.randint(0, 3, (4,), generator=generator)


def lr_at(step: int) -> float:
    return 0.01 * (step + 1)


def lr_scale_of(name: str) -> float:
    return 0.25 if name.startswith("body") else 1.0


@dataclass(frozen=True)
class Job:
    """Training from a run directory's newest checkpoint, or from random weights, until a step; saves every 3 steps.

    Attributes:
        seed: of the weights before a checkpoint is loaded.
    """

    recipe: Recipe
    until: int
    seed: int = 0
    choice: OptimizerChoice | None = None
    scaled: bool = True
    model: tuple[bool, bool] = (True, False)


def train(ranks: Ranks, jobs: list[Job]) -> list[dict[str, Any]]:
    """Does the jobs in order; returns for each its first step, and the groups' learning rates at each step."""
    return [_train(ranks, job) for job in jobs]


def _train(ranks: Ranks, job: Job) -> dict[str, Any]:
    import deepspeed

    job.recipe.run_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(job.seed)
    model = Small(*job.model)
    optimizer = build_optimizer(job.recipe, model, job.choice, lr_scale_of if job.scaled else None)
    config = deepspeed_config(job.recipe, ranks.world_size)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    resumed = resume(engine, job.recipe.run_dir, ranks)
    first = resumed.manifest.step if resumed else 0
    saver = Saver(engine, job.recipe, {}, ranks, first if resumed else None)
    accumulation = job.recipe.accumulation(ranks.world_size)
    rates = []
    for step in range(first, job.until):
        set_lr(engine.optimizer, lr_at(step))
        rates.append([group["lr"] for group in engine.optimizer.param_groups])
        for micro_step in range(accumulation):
            engine.backward(engine(*batch_at(step, ranks.rank * accumulation + micro_step)))
            engine.step()
        if (step + 1) % 3 == 0:
            saver.save(Progress(step + 1, 0.0, None, {"samples": GLOBAL_BATCH * (step + 1), "skipped": 0}, {}))
    saver.wait()
    engine.destroy()
    return {"first": first, "rates": rates, "error": saver.error}


def plain_loop(worlds: list[int]) -> tuple[list[list[float]], dict[str, Tensor], list[dict[str, Tensor]]]:
    """The same training in plain torch: three steps on each number of ranks.

    Returns:
        Learning rates of the three groups at each step; parameters by name; buffers of each rank by name.
    """
    torch.manual_seed(0)
    model = Small()
    groups = [
        {"params": [model.body.weight], "weight_decay": WEIGHT_DECAY},
        {"params": [model.head.weight], "weight_decay": WEIGHT_DECAY},
        {"params": [model.head.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    names = ("running_mean", "running_var", "num_batches_tracked")
    of_ranks = [{name: getattr(model.norm, name).clone() for name in names}]
    rates = []
    for part, world_size in enumerate(worlds):
        if len(of_ranks) != world_size:
            mean = {name: torch.stack([buffers[name] for buffers in of_ranks]).double().mean(0) for name in names[:2]}
            mean["num_batches_tracked"] = torch.stack([buffers[names[2]] for buffers in of_ranks]).amax()
            of_ranks = [{name: value.clone() for name, value in mean.items()} for _ in range(world_size)]
        for step in range(3 * part, 3 * part + 3):
            lr = lr_at(step)
            for group, scale in zip(optimizer.param_groups, (0.25, 1.0, 1.0), strict=True):
                group["lr"] = scale * lr
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.zero_grad()
            for rank, buffers in enumerate(of_ranks):
                for name in names:
                    getattr(model.norm, name).copy_(buffers[name])
                for micro_step in range(4 // world_size):
                    (model(*batch_at(step, rank * 4 // world_size + micro_step)) / 4).backward()
                of_ranks[rank] = {name: getattr(model.norm, name).clone() for name in names}
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
            optimizer.step()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return rates, weights, [{f"norm.{name}": value for name, value in buffers.items()} for buffers in of_ranks]
