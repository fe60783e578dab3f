from mixmae.trainer.evaluation.class_colors import color_of, palette


def test_classes_have_colors_of_their_own() -> None:
    colors = palette()
    assert len({tuple(color) for color in colors.tolist()}) == 256
    assert colors[:3].tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0]]  # PASCAL VOC's classes 1 to 3
    assert [color_of(number) for number in (1, 254, 256)] == [(0, 128, 0), tuple(colors[254].tolist()), (0, 128, 0)]
