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


def test_of_masks_that_overlap_the_first_lies_on_top() -> None:
    image = torch.full((3, 40, 40), 100, dtype=torch.uint8)
    masks = torch.zeros(2, 40, 40, dtype=torch.bool)
    masks[0, 10:30, 10:30], masks[1, 20:40, 20:40] = True, True
    boxes = torch.tensor([[10, 10, 30, 30], [20, 20, 40, 40]])
    drawn = draw_objects(image, boxes, iter(masks), [4, 9])
    for (row, column), number in (((15, 15), 4), ((25, 25), 4), ((35, 35), 9)):
        expected = 0.55 * image[:, row, column] + 0.45 * torch.tensor(color_of(number))
        torch.testing.assert_close(drawn[:, row, column].float(), expected, atol=0.51, rtol=0)
    assert (drawn[:, 5, 5] == 100).all()
