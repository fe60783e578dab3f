"""Images with the objects that a COCO file (`instances_*.json`) lists, as a source of shards."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from mixmae.base.errors import UsageError
from mixmae.base.files import what_is
from mixmae.base.json_text import parse_json
from mixmae.trainer.data.annotations import AnnotationKind
from mixmae.trainer.data.decode import upright_size
from mixmae.trainer.data.dense.objects import dump_objects
from mixmae.trainer.data.extensions import ALL_IMAGE_EXTENSIONS
from mixmae.trainer.data.faults import Reason, UnusableError, first_names
from mixmae.trainer.data.index import UNLABELLED
from mixmae.trainer.data.shards.heic import require_heic_reader
from mixmae.trainer.data.shards.image_files import Files
from mixmae.trainer.data.shards.image_folders import extension_of, find_images
from mixmae.trainer.data.shards.source import Entry, key_of, unique

_KEPT = ("id", "bbox", "area", "iscrowd", "segmentation")
"""What shards keep of an annotation, beside its category."""


@dataclass(frozen=True, kw_only=True)
class Coco(Files):
    """The images of a COCO file; references are their names relative to `root`."""

    category_ids: Sequence[int]
    objects: dict[str, bytes]
    """Annotations by key."""
    sizes: dict[str, tuple[int, int]]
    """Height and width of the images by key, where the file has them."""
    description: str
    annotations: AnnotationKind | None = "objects"

    def annotation(self, entry: Entry, image: bytes) -> bytes:
        found = upright_size(image)
        if (said := self.sizes.get(entry.key, found)) != found:
            raise UnusableError(
                Reason.ANNOTATION_OF_ANOTHER_SIZE,
                f"{said[0]} x {said[1]} pixels by the COCO file, {found[0]} x {found[1]} as a viewer shows the image",
            )
        return self.objects[entry.key]

    def describe(self) -> str:
        return self.description


def open_coco(images: str, file: Path) -> Coco:
    """The images of a folder with the objects of a COCO file. Says on standard error what it does not use.

    Raises:
        UsageError: no such folder; a file that is no COCO file; images that it lists and that are not there.
    """
    root = Path(images).resolve()
    if not root.is_dir():
        raise UsageError(f"{images} {what_is(root)}; expected the folder with the images that {file} lists")
    try:
        encoded = file.read_bytes()
        content = parse_json(encoded)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read {file}: {error}; expected a COCO file such as instances_train2017.json"
        ) from error
    listed = _section(file, content, "images", {"id": int, "file_name": str})
    categories = sorted(_section(file, content, "categories", {"id": int, "name": str}), key=lambda one: int(one["id"]))
    objects = _objects_by_image(file, content, [one["id"] for one in listed], [one["id"] for one in categories])
    entries = _entries(root, file, listed, objects)
    by_key = {entry.key: image for entry, image in zip(entries, listed, strict=True)}
    return Coco(
        root,
        entries,
        list(unique(one["name"] for one in categories)),
        category_ids=[one["id"] for one in categories],
        objects={key: objects[image["id"]] for key, image in by_key.items()},
        sizes={key: (one["height"], one["width"]) for key, one in by_key.items() if _says_size(one)},
        description=f"files of {root} with the objects of {file} ({xxhash.xxh3_64_hexdigest(encoded)})",
    )


def _says_size(image: dict[str, Any]) -> bool:
    return image.get("height") is not None and image.get("width") is not None


def _section(file: Path, content: Any, name: str, fields: dict[str, type]) -> list[dict[str, Any]]:
    """A list of a COCO file, each of whose elements has some fields."""
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, list) or not found:
        raise UsageError(f"{file} has no {name!r}; expected a COCO file with images, annotations and categories")
    seen: set[int] = set()
    for number, one in enumerate(found):
        for field, kind in fields.items():
            if not isinstance(one, dict) or type(one.get(field)) is not kind:
                got = one.get(field) if isinstance(one, dict) else one
                raise UsageError(f"{file}, {name}[{number}]: {field} is {got!r}; expected {_WORDS[kind]}")
        if one["id"] in seen:
            raise UsageError(f"{file}, {name}[{number}]: id {one['id']} is there twice; expected ids of their own")
        seen.add(one["id"])
    return found


_WORDS = {int: "a whole number", str: "text"}


def _objects_by_image(file: Path, content: Any, images: list[int], categories: list[int]) -> dict[int, bytes]:
    """The annotation of each image; a list without objects where it has none."""
    numbers = {category: number for number, category in enumerate(categories)}
    annotations = content.get("annotations")
    if not isinstance(annotations, list):
        raise UsageError(f"{file} has no 'annotations'; expected a list of objects (image_info files have none)")
    by_image: dict[int, list[dict[str, Any]]] = {image: [] for image in images}
    elsewhere = []
    for number, one in enumerate(annotations):
        if not isinstance(one, dict) or "bbox" not in one:
            raise UsageError(f"{file}, annotations[{number}] has no bbox; expected an object of instances_*.json")
        if one.get("category_id") not in numbers:
            raise UsageError(
                f"{file}, annotations[{number}]: category_id is {one.get('category_id')!r}; expected the id of one of "
                f"the {len(categories)} categories"
            )
        if one.get("image_id") not in by_image:
            elsewhere.append(str(one.get("image_id")))
            continue
        kept = {"id": number, "category": numbers[one["category_id"]]} | {k: one[k] for k in _KEPT if k in one}
        by_image[one["image_id"]].append(kept)
    if elsewhere:
        raise UsageError(
            f"{file}: {len(elsewhere)} annotations are of images that it does not list: "
            f"image_id {first_names(elsewhere)}"
        )
    return {image: dump_objects(objects, image) for image, objects in by_image.items()}


def _entries(root: Path, file: Path, listed: list[dict[str, Any]], objects: dict[int, bytes]) -> list[Entry]:
    names = [one["file_name"] for one in listed]
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise UsageError(
            f"{len(missing)} of the {len(names)} images that {file} lists are not in {root}: {first_names(missing)}"
        )
    strange = [name for name in names if extension_of(Path(name)) not in ALL_IMAGE_EXTENSIONS]
    if strange:
        raise UsageError(f"{file} lists files that are no {', '.join(ALL_IMAGE_EXTENSIONS)}: {first_names(strange)}")
    require_heic_reader(names)
    _report_unlisted(root, file, names)
    _report_repeated(file, names)
    return [
        Entry(key, name, (root / name).stat().st_size, UNLABELLED, len(objects[one["id"]]))
        for key, name, one in zip(unique(map(key_of, names)), names, listed, strict=True)
    ]


def _report_unlisted(root: Path, file: Path, names: list[str]) -> None:
    listed = {os.path.normpath(name) for name in names}
    found = [str(image.relative_to(root)) for image, _ in find_images(root).images]
    others = [name for name in found if name not in listed]
    if others:
        print(f"not used: {len(others)} images that {file} does not list: {first_names(others)}", file=sys.stderr)


def _report_repeated(file: Path, names: list[str]) -> None:
    repeated = [name for name, count in Counter(map(os.path.normpath, names)).items() if count > 1]
    if repeated:
        print(
            f"{len(repeated)} images are listed more than once in {file}, and each stands in the shards as often, with "
            f"the objects of one id: {first_names(repeated)}; to merge them, give their objects one image_id",
            file=sys.stderr,
        )
