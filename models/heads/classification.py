"""Classification: an encoder's own linear head, and the loss of soft targets."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmae.models.contract import TrainableEncoder
from mixmae.models.encoders.contract import Encoder
from mixmae.models.heads.mixup import mix_images, mix_targets

_HEAD_STD = 2e-5
"""Of the head's first weights: logits begin at 0, so that the first steps leave the encoder as it was pretrained."""


class Classifier(TrainableEncoder):
    """`classifier(images, targets, mix=None) -> loss`, and without targets the logits [B, classes], in fp32.

    The head is MixMIM's: the final norm on tokens, their mean, one linear layer. The loss is the cross entropy of soft
    targets; for several labels an image the mean of the classes' binary ones.

    Args:
        encoder: gets a new head, which a checkpoint holds under `encoder.` too.
        label_smoothing: share of a target that is spread over all classes.
        mixes: whether micro-batches are mixed, which takes two images.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        multi_label: bool = False,
        label_smoothing: float = 0.0,
        mixes: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_classes, self.multi_label, self.label_smoothing = num_classes, multi_label, label_smoothing
        self.min_batch = 2 if mixes else 1
        add_linear_head(encoder, num_classes)

    def forward(self, images: Tensor, *inputs: Tensor) -> Tensor:
        """The loss of normalised images [B, 3, H, W]; without `inputs` their logits.

        Args:
            inputs: targets, int64 [B] or of any type [B, classes], and what `draw_mix` gave if the images are mixed.
        """
        if not inputs:
            return self.logits(images)
        targets = self.soft_targets(inputs[0])
        if len(inputs) > 1:
            images, targets = mix_images(images, inputs[1]), mix_targets(targets, inputs[1])
        return self.loss(self.logits(images), targets)

    def logits(self, images: Tensor) -> Tensor:
        dtype = next(self.encoder.parameters()).dtype
        return self.encoder(images.to(dtype)).float()

    def soft_targets(self, targets: Tensor) -> Tensor:
        """fp32 [B, classes]: of class numbers [B], of flags [B, classes] where labels are several, else as given."""
        smoothing = self.label_smoothing
        if targets.dim() == 1:
            rest = smoothing / self.num_classes
            flat = torch.full((len(targets), self.num_classes), rest, device=targets.device)
            return flat.scatter_(1, targets[:, None], 1 - smoothing + rest)
        if self.multi_label:
            return targets.float() * (1 - smoothing) + smoothing / 2
        return targets.float()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of soft targets [B, classes]."""
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits, targets)
        return F.cross_entropy(logits, targets)


def add_linear_head(encoder: Encoder, num_classes: int, std: float = _HEAD_STD) -> None:
    """Gives an encoder mean pooling and a new linear layer; weights truncated normal, bias 0."""
    model: Any = encoder  # by timm's contract
    model.reset_classifier(num_classes, "avg")
    linear = model.get_classifier()
    nn.init.trunc_normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
