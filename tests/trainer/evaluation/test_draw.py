import pytest
import torch

from mixmae.trainer.evaluation.class_colors import color_of
from mixmae.trainer.evaluation.draw import draw_objects


@pytest.mark.parametrize(("side", "letters"), [(100, 10), (1200, 30)])
def test_labels_stand_at_their_boxes_in_letters_that_grow_with_the_image(side: int, letters: int) -> None:
    image, masks = torch.zeros(3, side, side, dtype=torch.uint8), torch.zeros(2, side, side, dtype=torch.bool)
    middle, edge = side // 2, side - 1
    boxes = torch.tensor([[middle, middle, edge, edge], [edge - 5, 0, edge, 5]])
    drawn = draw_objects(image, boxes, masks, [0, 1], ["0.98", "0.51"])
    above = drawn[:, middle - letters // 2, middle:].movedim(0, -1)
    assert (above == torch.tensor(color_of(0))).all(-1).any(), "above its box"
    assert drawn[:, : middle - 2 * letters, : middle + 1].sum() == 0, "and nowhere else"
    assert drawn[:, letters // 2, side - letters].any(), "inside the image, without room above and at the right"
    assert draw_objects(image, boxes, masks, [0, 1])[:, : middle - letters // 2, : middle + 1].sum() == 0
