"""Verifying an annotation against the image that it stands beside."""

from collections.abc import Sequence
from typing import NamedTuple

from mixmae.trainer.data.annotations import ANNOTATED, AnnotationKind
from mixmae.trainer.data.dense.label_maps import highest_label, parse_label_map
from mixmae.trainer.data.dense.objects import FaultyObject, faulty_objects, highest_class
from mixmae.trainer.data.faults import Reason, UnusableError


class Inspection(NamedTuple):
    """What was found in an annotation."""

    state: int
    """`ANNOTATED`, or the `Reason` why it cannot be used."""
    faulty: Sequence[FaultyObject] = ()
    """Single objects that cannot be used."""
    highest: int = -1
    """The highest class number."""
    detail: str = ""


def inspect_annotation(
    kind: AnnotationKind, content: bytes, height: int, width: int, num_classes: int = 0
) -> Inspection:
    """Reads an annotation as training does.

    Args:
        height, width: of the upright image.
        num_classes: 0 where it is not known.
    """
    try:
        faulty: Sequence[FaultyObject] = ()
        if kind == "objects":
            faulty = faulty_objects(content, height, width)
            highest, number = highest_class(content)
            where = f"object {number} has category"
        else:
            highest, where = highest_label(parse_label_map(content, height, width)), "there is label"
    except UnusableError as error:
        return Inspection(error.reason, detail=str(error))
    if num_classes and highest >= num_classes:
        return Inspection(Reason.BAD_LABEL, detail=f"{where} {highest}; expected at most {num_classes - 1}")
    return Inspection(ANNOTATED, faulty, highest)
