"""`data:`: where shards are, how they are read, and the order of their samples."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from mixmae.trainer.recipe.sections.pixels import FULL_SCALE, DType, PixelFormat
from mixmae.trainer.recipe.sections.places import ShardPlaces, describe_places, places_of, require_weights
from mixmae.trainer.recipe.sections.section import Deviation, Seconds, Section, is_elsewhere
from mixmae.trainer.recipe.units import Size


class Network(Section):
    """How shards behind a URL are read."""

    timeout: Seconds = 30.0
    """Seconds without an answer after which a read is given up and tried again."""
    retries: int = Field(5, ge=0, le=100)
    """Further tries of a failed read, 0.5, 1, 2, ... seconds apart."""
    allow_shell: bool = False
    """Whether `pipe:COMMAND` may be a shard directory: its command runs in a shell on every node."""


class Cache(Section):
    """Where blocks of shards behind a URL are kept on this node."""

    dir: Path | None = None
    """Shared by the ranks of a node, and kept. None: a temporary folder of each rank, gone when the run ends."""
    max_bytes: Size = 20 * 10**9


class Data(Section):
    shards: ShardPlaces = "shards"
    """A directory, or the URL of one: http(s)://, s3://, or anything that fsspec opens; braces as a shell expands them
    (`s3://b/train-{000000..001281}.tar`). Or a list of these, perhaps with weights: `{shards: DIR, weight: 2}`."""
    num_workers: int = Field(4, ge=0, le=1024)
    prefetch_factor: int = Field(4, ge=1, le=1024)
    decoder: Literal["fast", "pillow"] = "fast"
    """`fast` decodes no more of a JPEG than the crop needs; `pillow` is the plain reference."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    hflip: float = Field(0.5, ge=0, le=1)
    channels: int = Field(3, gt=0, le=1024)
    """Of the images; 3 of uint8 are RGB, and any image becomes that. Others have to have these channels."""
    dtype: DType = "uint8"
    """Of the images' values; 16 bits are kept until they are normalised."""
    scale: float | None = Field(None, gt=0)
    """What values are divided by before mean and std; None: 255 of uint8, 65535 of uint16, 1 of float32."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Of each channel."""
    std: tuple[Deviation, ...] = (0.229, 0.224, 0.225)
    nodata: float | Literal["nan"] | None = None
    """The value of pixels that hold nothing: where any channel has it, the model sees the mean, and reconstruction is
    not judged. None: all pixels hold something."""
    streams: int | None = Field(None, gt=0)
    """Canonical streams, a whole number for each rank; None: up to 512 that divide global_batch."""
    shuffle_window: int = Field(64, gt=0, le=2**24)
    """Samples of a stream that are shuffled among each other; also what a resume reads again at most."""
    drop_last: bool = False
    """Drops the samples that do not fill an epoch's last global batch; else they open the next epoch."""
    max_corrupt_fraction: float = Field(0.01, ge=0, lt=1)
    """Unusable samples that a rank steps over in an epoch, as a share of its samples; more end the run."""
    max_pixels: int = Field(178_956_970, gt=0, le=178_956_970)
    """Larger images are unusable: a worker decodes one in 4 bytes a pixel, and more while it does."""
    network: Network = Network()
    cache: Cache = Cache()

    @property
    def pixels(self) -> PixelFormat:
        scale = FULL_SCALE[self.dtype] if self.scale is None else self.scale
        nodata, fill = self.nodata, tuple(value * scale for value in self.mean)
        return PixelFormat(self.channels, self.dtype, scale, None if nodata is None else float(nodata), fill)

    @model_validator(mode="after")
    def _each_channel_has_a_mean_and_a_deviation(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(
                    f"{name}={list(values)} has {len(values)} values; expected one for each of data.channels="
                    f"{self.channels}"
                )
        return self

    @property
    def directories(self) -> list[Path] | None:
        """The shards' directories; None if some are behind a URL or a command."""
        locations = [place.location for place in places_of(self.shards)]
        return None if any(map(is_elsewhere, locations)) else [Path(location) for location in locations]

    @property
    def where(self) -> str:
        """The places of the shards, for messages."""
        return describe_places(self.shards)

    @model_validator(mode="after")
    def _all_places_have_weights_or_none(self) -> Self:
        require_weights(self.shards)
        return self

    @model_validator(mode="after")
    def _crops_are_shares_of_the_image(self) -> Self:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale={[low, high]}: expected shares of the image's area, 0 < low <= high <= 1")
        return self
