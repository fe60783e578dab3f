from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from mixmae.trainer.data.annotations import ANNOTATED
from mixmae.trainer.data.dense.inspection import inspect_annotation
from mixmae.trainer.data.dense.objects import dump_objects, faulty_objects, image_id_of, parse_objects, without_faulty
from mixmae.trainer.data.faults import Reason, UnusableError

HEIGHT, WIDTH = 24, 36
NUMBERS = st.one_of(st.integers(-50, 90), st.floats(), st.sampled_from([10**400, 2**31, -(2**63)]))
POLYGONS = st.lists(st.lists(NUMBERS, max_size=6), max_size=2)
RUNS = st.one_of(st.text(max_size=30), st.lists(NUMBERS, max_size=6), st.none())
SIZES = st.one_of(st.just([HEIGHT, WIDTH]), st.lists(NUMBERS, max_size=3))
SEGMENTATIONS = st.one_of(st.none(), POLYGONS, st.fixed_dictionaries({}, optional={"size": SIZES, "counts": RUNS}))
OBJECTS = st.fixed_dictionaries(
    {"category": st.one_of(st.integers(0, 9), NUMBERS), "bbox": st.lists(NUMBERS, min_size=3, max_size=4)},
    optional={"segmentation": SEGMENTATIONS, "id": NUMBERS, "area": NUMBERS, "iscrowd": st.sampled_from([0, 1, 2])},
)


@settings(max_examples=25)
@given(st.lists(OBJECTS, min_size=1, max_size=2))
def test_whatever_an_annotation_says_it_is_read_or_refused(items: list[dict[str, Any]]) -> None:
    content = dump_objects(items)
    try:
        faulty = faulty_objects(content, HEIGHT, WIDTH)
    except UnusableError:
        return
    usable = parse_objects(content, HEIGHT, WIDTH)
    assert len(usable) == len(items) - len(faulty)
    assert all(usable.mask(i).any() for i in range(len(usable)))


def test_a_category_that_is_no_class_spoils_its_image() -> None:
    """Training could not tell it from a class."""
    square = {"category": 2, "bbox": [1, 1, 8, 8], "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]], "id": 7}
    content = dump_objects([square])
    assert inspect_annotation("objects", content, HEIGHT, WIDTH, 3).state == ANNOTATED
    assert inspect_annotation("objects", content, HEIGHT, WIDTH) == (ANNOTATED, [], 2, "")
    found = inspect_annotation("objects", content, HEIGHT, WIDTH, 2)
    assert (found.state, found.detail) == (Reason.BAD_LABEL, "object 7 has category 2; expected at most 1")


def test_faulty_objects_are_told_from_others_with_their_id() -> None:
    """Ids of COCO's crowds have 12 digits; those of other programs may be there twice."""
    square = {"category": 2, "bbox": [1, 1, 8, 8], "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]], "id": 900100448263}
    content = dump_objects([square, square | {"bbox": [1, 1, 0, 8]}, square | {"segmentation": []}, square | {"id": 1}])
    faulty = faulty_objects(content, HEIGHT, WIDTH)
    assert [(one.id, one.reason) for one in faulty] == [
        (900100448263, Reason.EMPTY_BOX),
        (900100448263, Reason.EMPTY_MASK),
    ]
    kept = parse_objects(without_faulty(content, faulty), HEIGHT, WIDTH)
    assert kept.ids.tolist() == [900100448263, 1]


def test_an_image_keeps_its_number_in_a_coco_file() -> None:
    square = {"category": 2, "bbox": [1, 1, 8, 8], "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]], "id": 7}
    content = dump_objects([square, square | {"bbox": [1, 1, 0, 8], "id": 8}], 139)
    kept = without_faulty(content, faulty_objects(content, HEIGHT, WIDTH))
    assert (image_id_of(content), image_id_of(kept), image_id_of(dump_objects([]))) == (139, 139, None)
    assert parse_objects(kept, HEIGHT, WIDTH).ids.tolist() == [7]
    assert inspect_annotation("objects", content, HEIGHT, WIDTH, 2).detail.startswith("object 8 has category 2")


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"3", b"[3]", b"[[]]", b"[{}]", b"\xff", b"[" * 100_000, b"null", b'{"image_id":"7","objects":[]}'],
)
def test_what_is_no_list_of_objects_is_refused(content: bytes) -> None:
    with pytest.raises(UnusableError, match="no list of objects") as caught:
        parse_objects(content, 4, 4)
    assert caught.value.reason == Reason.DAMAGED_ANNOTATION


@given(st.lists(st.tuples(st.floats(-9, 45), st.floats(-9, 33)), min_size=3, max_size=8))
def test_polygons_are_rasterised_as_pycocotools_does(points: list[tuple[float, float]]) -> None:
    polygon = [value for point in points for value in point]
    item = {"category": 0, "bbox": [0, 0, 9, 9], "segmentation": [polygon]}
    found = parse_objects(dump_objects([item]), HEIGHT, WIDTH)
    expected = coco.decode(coco.merge(coco.frPyObjects([polygon], HEIGHT, WIDTH)))
    assert np.array_equal(found.mask(0) if len(found) else np.zeros_like(expected), expected)
    assert not len(found) or found.areas[0] == expected.sum()
