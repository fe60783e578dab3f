import torch

from mixmae.trainer.evaluation.label_colors import paint, paint_normalised


def test_ignored_pixels_stay_as_they_are() -> None:
    images, labels = torch.rand(2, 3, 4, 5), torch.randint(0, 9, (2, 4, 5), dtype=torch.uint8)
    labels[:, 1] = 255
    painted = paint(images, labels)
    assert torch.equal(painted[:, :, 1], images[:, :, 1])
    assert not torch.isclose(painted[:, :, 0], images[:, :, 0]).all()
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    shift, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    again = paint_normalised((images - shift) / scale, labels, mean, std) * scale + shift
    torch.testing.assert_close(again, painted)
