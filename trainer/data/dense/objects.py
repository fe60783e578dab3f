"""The objects of an image: what `KEY.objects.json` beside it holds, a list in the manner of COCO's annotations.

An object: `category` (number of its class), `bbox` [x, y, width, height] in pixels of the upright image, `segmentation`
(polygons or RLE), and perhaps `iscrowd`, `area` (of the mask, by which COCO sorts objects into small and large), `id`.
Where the image has a number in a COCO file, by which result files name it, the list is `objects` beside `image_id`.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mixmae.base.json_text import parse_json
from mixmae.trainer.data.dense.masks import Mask, Rle, area, decode, rle_of
from mixmae.trainer.data.faults import Reason, UnusableError

_MOST, _MOST_ID = 2**31, 2**63
"""Of categories; of ids, which of COCO's crowds have 12 digits."""


@dataclass(frozen=True)
class Objects:
    """The usable objects of an image, N in all."""

    boxes: npt.NDArray[np.float32]
    """[N, 4]: left, upper, right, lower, as the annotation says; they may reach a little beyond the image."""
    classes: npt.NDArray[np.int64]
    """[N]."""
    crowd: npt.NDArray[np.bool_]
    """[N]; whether an object stands for a group of them."""
    areas: npt.NDArray[np.float64]
    """[N]; pixels of the objects, as the annotation says."""
    ids: npt.NDArray[np.int64]
    """[N]; of the annotations, unique in a COCO file."""
    segmentations: list[Rle]
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.classes)

    def mask(self, i: int) -> Mask:
        """uint8 [height, width], 1 on the object."""
        return decode(self.segmentations[i])


class FaultyObject(NamedTuple):
    """An object that cannot be used."""

    id: int
    reason: Reason
    number: int
    """Its place in the list: ids may be missing, or there twice."""


class _Object(NamedTuple):
    item: dict[str, Any]
    rle: Rle


def parse_objects(content: bytes, height: int, width: int) -> Objects:
    """The usable objects in the bytes of an annotation; those that are not were counted when it was indexed.

    Args:
        height, width: of the upright image.

    Raises:
        UnusableError: the bytes are no list of objects.
    """
    found = [one for one in _objects(content, height, width) if isinstance(one, _Object)]
    items = [one.item for one in found]
    boxes = np.array([item["bbox"] for item in items], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Objects(
        boxes.astype(np.float32),
        np.array([item["category"] for item in items], np.int64),
        np.array([item.get("iscrowd", 0) for item in items], np.bool_),
        np.array([item.get("area", area(rle)) for item, rle in found], np.float64),
        np.array([item.get("id", 0) for item in items], np.int64),
        [one.rle for one in found],
        height,
        width,
    )


def faulty_objects(content: bytes, height: int, width: int) -> list[FaultyObject]:
    """The objects of an annotation that cannot be used.

    Raises:
        UnusableError: the bytes are no list of objects.
    """
    return [one for one in _objects(content, height, width) if isinstance(one, FaultyObject)]


def without_faulty(content: bytes, faulty: Sequence[FaultyObject]) -> bytes:
    """An annotation's bytes without some of its objects."""
    numbers, (items, image_id) = {one.number for one in faulty}, _loaded(content)
    return dump_objects([item for number, item in enumerate(items) if number not in numbers], image_id)


def dump_objects(items: list[dict[str, Any]], image_id: int | None = None) -> bytes:
    """An annotation's bytes.

    Args:
        image_id: of the image in a COCO file, if it comes from one.
    """
    content = items if image_id is None else {"image_id": image_id, "objects": items}
    return json.dumps(content, separators=(",", ":")).encode()


def image_id_of(content: bytes) -> int | None:
    """The image's number in the COCO file that its annotation comes from; None for one that comes from elsewhere.

    Raises:
        UnusableError: the bytes are no list of objects.
    """
    return _items(content)[1]


def highest_class(content: bytes) -> tuple[int, int]:
    """The highest class number of an annotation and the id of an object that has it; -1 and 0 without objects."""
    items = enumerate(_loaded(content)[0])
    return max(((item["category"], item.get("id", number)) for number, item in items), default=(-1, 0))


def _objects(content: bytes, height: int, width: int) -> Iterator[_Object | FaultyObject]:
    for number, item in enumerate(_items(content)[0]):
        found = _usable(item, height, width)
        if isinstance(found, Reason):
            yield FaultyObject(item.get("id", number), found, number)
        else:
            yield _Object(item, found)


def _loaded(content: bytes) -> tuple[Any, Any]:
    """The list in an annotation's bytes, and the image's number in a COCO file."""
    found = parse_json(content)
    return (found["objects"], found["image_id"]) if isinstance(found, dict) else (found, None)


def _items(content: bytes) -> tuple[list[dict[str, Any]], int | None]:
    """What `_loaded` gives. Raises UnusableError where it is no list, or an object lacks what all have."""
    try:
        items, image_id = _loaded(content)
        if image_id is not None and type(image_id) is not int:
            raise ValueError(f"image_id is {image_id!r}; expected a whole number")
        for item in items:
            _require_fields(item)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UnusableError(Reason.DAMAGED_ANNOTATION, f"no list of objects: {what}") from error
    return list(items), image_id


def _require_fields(item: dict[str, Any]) -> None:
    """Raises ValueError, or what comes of other types, where an object lacks what all have."""
    category, number = item["category"], item.get("id", 0)
    if type(category) is not int or type(number) is not int or not 0 <= category < _MOST or abs(number) >= _MOST_ID:
        raise ValueError(f"category and id are {category!r} and {number!r}; expected whole numbers")
    box, size = item["bbox"], item.get("area", 0)
    if len(box) != 4 or any(isinstance(value, str) or math.isnan(value) for value in (*box, size)):
        raise ValueError(f"bbox and area are {box!r} and {size!r}; expected x, y, width, height, and a number")
    if item.get("iscrowd", 0) not in (0, 1):
        raise ValueError(f"iscrowd is {item['iscrowd']!r}; expected 0 or 1")


def _usable(item: dict[str, Any], height: int, width: int) -> Rle | Reason:
    """An object's mask, or why it cannot be used."""
    x, y, w, h = item["bbox"]
    if not all(map(math.isfinite, (x, y, w, h))) or x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return Reason.OUTSIDE_IMAGE
    if w <= 0 or h <= 0:
        return Reason.EMPTY_BOX
    segmentation = item.get("segmentation")
    if not segmentation:
        return Reason.EMPTY_MASK
    try:
        rle = rle_of(segmentation, height, width)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError, OverflowError):
        size = segmentation.get("size") if isinstance(segmentation, dict) else None
        other_size = isinstance(size, list) and size != [height, width]
        return Reason.ANNOTATION_OF_ANOTHER_SIZE if other_size else Reason.DAMAGED_MASK
    return rle if area(rle) else Reason.EMPTY_MASK
