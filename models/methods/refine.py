"""Refinement: a short contrastive training of a pretrained encoder, whose features then tell classes apart without
labels (MIM-Refiner, arXiv 2402.10093).

Encoders of masked image modelling lose in their last blocks, which learn to reconstruct, what blocks before them know
of what an image shows. Heads behind several of the last blocks pull that knowledge to the end.
"""

import torch
from torch import Tensor, nn

from mixmae.models.encoders.contract import Encoder
from mixmae.models.layers.blocks import init_weights
from mixmae.models.methods.contract import Method
from mixmae.models.methods.neighbours import NeighbourHead
from mixmae.models.methods.registry import register_method
from mixmae.models.methods.views import draw_views, views_of


@register_method("refine")
class Refine(Method):
    """`Refine(images, crops, colours) -> loss`: the mean of all heads' losses.

    Unlike the paper there is no momentum encoder: queue and negatives are of the encoder itself, as in NNCLR, so that
    no second copy of the weights has to be kept.

    Args:
        num_blocks: so many of the last blocks have a head.
        hidden_dim: width of the heads' hidden layers.
        embed_dim: width of embeddings.
        queue_size: embeddings in which neighbours are looked for; an image finds itself where they outnumber images.
        temperature: of the loss's similarities.
        min_scale: the smallest share of an image's area that a view shows.

    Raises:
        ValueError: as many blocks are not there, or a value is out of its range.
    """

    min_batch = 2

    def __init__(
        self,
        encoder: Encoder,
        num_blocks: int = 4,
        hidden_dim: int = 2048,
        embed_dim: int = 256,
        queue_size: int = 65536,
        temperature: float = 0.2,
        min_scale: float = 0.25,
    ) -> None:
        super().__init__(encoder)
        stages = range(1, encoder.num_stages + 1)
        dims = [info["num_chs"] for info in encoder.feature_info]
        widths = [dims[stage - 1] for stage in stages for _ in encoder.stage_blocks(stage)]
        if not 1 <= num_blocks <= len(widths):
            raise ValueError(f"num_blocks is {num_blocks}; expected 1 to {len(widths)}, the encoder's blocks")
        if queue_size < 1 or hidden_dim < 1 or embed_dim < 1 or temperature <= 0 or not 0 < min_scale <= 1:
            raise ValueError(
                f"queue_size {queue_size}, hidden_dim {hidden_dim}, embed_dim {embed_dim}, temperature {temperature}, "
                f"min_scale {min_scale}: expected numbers above 0, and a min_scale up to 1"
            )
        self.num_blocks, self.min_scale = num_blocks, min_scale
        self.heads = nn.ModuleList(
            NeighbourHead(width, hidden_dim, embed_dim, queue_size, temperature) for width in widths[-num_blocks:]
        )
        self.heads.apply(init_weights)

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return draw_views(batch, self.min_scale, generator)

    def forward(self, images: Tensor, crops: Tensor, colours: Tensor) -> Tensor:  # type: ignore[override]
        """The loss, an fp32 scalar, for normalised fp32 images [B, C, H, W]."""
        views = views_of(images, crops, colours).to(next(self.heads.parameters()).dtype)
        features = self.encoder.forward_blocks(views, self.num_blocks)
        losses = [head(of_block) for head, of_block in zip(self.heads, features, strict=True)]
        return torch.stack(losses).mean()
