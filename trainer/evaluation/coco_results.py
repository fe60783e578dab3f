"""COCO result files: what a detector found, as pycocotools' `COCO.loadRes` and COCO's evaluation server read it."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mixmae.base.errors import UsageError
from mixmae.base.files import replacing
from mixmae.base.redaction import redact
from mixmae.trainer.data.dense.objects import image_id_of
from mixmae.trainer.data.faults import UnusableError
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.evaluation.average_precision import Result


@dataclass(frozen=True)
class ResultFile:
    """A file to be written, in which images and classes have the numbers of the COCO file that shards were built from.

    Attributes:
        image_ids: of the shards' samples.
        category_ids: of the classes.
    """

    file: Path
    image_ids: Sequence[int]
    category_ids: Sequence[int]

    @classmethod
    def of_shards(cls, file: Path, index: ShardIndex) -> Self:
        """With the numbers that shards with objects keep.

        Raises:
            UsageError: they keep none, two images have the same, or an annotation cannot be read.
        """
        ids = [number for sample in range(len(index)) if (number := _image_id(index, sample)) is not None]
        where = redact(index.store.location)
        if len(ids) < len(index) or not index.category_ids:
            raise UsageError(
                f"--results {file}: results name images and classes by their ids in a COCO file, which the shards in "
                f"{where} do not keep; build them again: 'mixmae shards build IMAGES OUT --coco FILE'"
            )
        repeated = [number for number, count in Counter(ids).items() if count > 1]
        if repeated:
            raise UsageError(
                f"--results {file}: image id {repeated[0]} is there twice in {where}, which comes from several COCO "
                "files; evaluate the shards of each file by themselves"
            )
        return cls(file, ids, index.category_ids)

    def write(self, results: Sequence[Result]) -> None:
        """Writes all that was found, a detection a line; the file appears when it is complete."""
        rows = (row for result in results for row in self._rows(result))
        with replacing(self.file) as partial, partial.open("w") as stream:
            stream.write("[")
            stream.writelines(f"{',' if number else ''}\n{json.dumps(row)}" for number, row in enumerate(rows))
            stream.write("\n]\n")

    def _rows(self, result: Result) -> Iterator[dict[str, Any]]:
        for one in result.detections:
            yield {
                "image_id": self.image_ids[result.image],
                "category_id": self.category_ids[one.category],
                "bbox": list(one.box),
                "score": one.score,
                "segmentation": {"size": [result.height, result.width], "counts": one.counts},
            }


def _image_id(index: ShardIndex, sample: int) -> int | None:
    try:
        return image_id_of(index.read_annotation(sample))
    except UnusableError as error:
        raise index.refusal(sample, error) from error
