"""Images with label maps in a second folder, as ADE20K has them, as a source of shards."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mixmae.base.errors import UsageError
from mixmae.base.files import what_is
from mixmae.trainer.data.annotations import AnnotationKind
from mixmae.trainer.data.decode import upright_size
from mixmae.trainer.data.dense.label_maps import MAX_CLASSES, reduce_zero_label
from mixmae.trainer.data.faults import Reason, UnusableError, first_names
from mixmae.trainer.data.index import UNLABELLED
from mixmae.trainer.data.shards.image_files import Files, list_folder
from mixmae.trainer.data.shards.source import Entry


@dataclass(frozen=True, kw_only=True)
class LabelMaps(Files):
    """Images, and PNGs of the same relative names in `maps`; references are paths relative to `root`."""

    maps: Path
    reduce_zero_label: bool
    annotations: AnnotationKind | None = "segments"

    def annotation(self, entry: Entry, image: bytes) -> bytes:
        try:
            content = _map_of(self.maps, entry).read_bytes()
        except FileNotFoundError as error:
            raise UnusableError(Reason.MISSING_ANNOTATION, str(error)) from error
        return reduce_zero_label(content, *upright_size(image)) if self.reduce_zero_label else content

    def describe(self) -> str:
        reduced = " reduced by label 0" if self.reduce_zero_label else ""
        return f"files of {self.root} with the label maps of {self.maps}{reduced}"


def _map_of(maps: Path, entry: Entry) -> Path:
    return maps / PurePosixPath(entry.reference).with_suffix(".png")


def _with_size(entry: Entry, label_map: Path) -> Entry:
    """An image without a label of its own, with the size of its label map: 0 without one."""
    size = label_map.stat().st_size if label_map.is_file() else 0
    return entry._replace(label=UNLABELLED, annotation_size=size)


def open_label_maps(images: str, maps: Path, reduce_zero_label: bool, class_names: Path | None) -> LabelMaps:
    """The images of a folder with the label maps of another.

    Args:
        class_names: a file with a name a line; None: classes have no names but their numbers, of which there are as
            many as the highest label says.

    Raises:
        UsageError: no such folder, no images in it, no label map of any of them, or class names that are none.
    """
    if not maps.is_dir():
        raise UsageError(f"{maps} {what_is(maps)}; expected a folder of PNGs with the names of the images")
    root, maps = Path(images).resolve(), maps.resolve()
    listed = list_folder(root)
    entries = [_with_size(entry, _map_of(maps, entry)) for entry in listed.entries]
    if not any(entry.annotation_size for entry in entries):
        raise UsageError(f"{maps} has no label map of any image in {images}; expected {_map_of(maps, entries[0])}, ...")
    classes = [] if class_names is None else _class_names(class_names)
    return LabelMaps(root, entries, classes, listed.left_out, maps=maps, reduce_zero_label=reduce_zero_label)


def _class_names(file: Path) -> list[str]:
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {file}: {error}") from error
    if not 0 < len(names) <= MAX_CLASSES:
        raise UsageError(f"{file} has {len(names)} class names; label maps hold 1 to {MAX_CLASSES} classes")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"{file} names {first_names(twice)} more than once; expected each class once")
    return names
