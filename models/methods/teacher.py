"""A frozen teacher: any model of timm, whose features of whole images are targets."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def open_teacher(name: str, weights: str | None = None, img_size: int | None = None) -> nn.Module:
    """A model of timm with its weights, in eval mode; on the meta device without them.

    Args:
        name: timm's, also `local-dir:DIRECTORY` or `hf-hub:REPOSITORY`.
        weights: file of its weights; None for those that timm has for the name.
        img_size: for which it is made; None for its own.

    Raises:
        ValueError: no such model or weights, a hub that cannot be reached, or a model without feature maps.
    """
    options: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    if weights is not None:
        options["pretrained_cfg_overlay"] = {"file": weights}
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn for the student does not depend on the teacher
            model = timm.create_model(name, pretrained=not torch.empty(0).is_meta, num_classes=0, **options)
    except Exception as error:  # of names, sizes, files, sockets and the hub's client, of whichever version
        reason = " ".join(str(error).split())[:200]
        where = f"teacher_weights {weights}" if weights is not None else "its weights"
        raise ValueError(
            f"teacher {name} cannot be opened with {where}: {reason}; take a name of timm.list_models(), and give "
            "teacher_weights a file where the hub cannot be reached"
        ) from error
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"teacher {name} gives no feature maps (forward_intermediates); take another of timm's models")
    return model.eval().requires_grad_(False)


class Teacher:
    """Features of a frozen model, cell by cell.

    No nn.Module on purpose: a method that holds it neither trains it nor saves or exports it.

    Args:
        model: as `open_teacher` gives it.
        grid: cells (Gh, Gw) of the student's last stage.
    """

    def __init__(self, model: nn.Module, grid: tuple[int, int]) -> None:
        self.model, self.grid = model, grid
        facts: Any = model.pretrained_cfg
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or facts["input_size"][1:]
        self.img_size = (int(size[0]), int(size[1]))
        self.mean, self.std = tuple(facts["mean"]), tuple(facts["std"])
        self.set_normalisation(self.mean, self.std)
        self.dim = int(model.num_features)  # type: ignore[arg-type]

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """How the student's images are normalised, which becomes the teacher's normalisation."""
        self._scale = [own / theirs for own, theirs in zip(std, self.std, strict=True)]
        self._shift = [(own - theirs) / by for own, theirs, by in zip(mean, self.mean, self.std, strict=True)]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """fp32 [B, dim, Gh, Gw] of images [B, 3, H, W], resampled to the grid, cells normalised over channels."""
        # By numbers, not by tensors of them: those would have to be copied to the device, which waits for it.
        parts = zip(images.split(1, dim=1), self._scale, self._shift, strict=True)
        x = torch.cat([channel * scale + shift for channel, scale, shift in parts], dim=1)
        if x.shape[2:] != self.img_size:
            x = F.interpolate(x, self.img_size, mode="bicubic", antialias=True)
        model: Any = self.model  # by timm's contract
        x = x.to(next(model.parameters()).dtype)
        maps: Tensor = model.forward_intermediates(x, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)[
            -1
        ].float()
        if maps.shape[2:] != self.grid:
            maps = F.interpolate(maps, self.grid, mode="bilinear", antialias=True)
        return F.layer_norm(maps.permute(0, 2, 3, 1), (maps.shape[1],)).permute(0, 3, 1, 2)
