import torch

from mixmae.models.methods.mixing import draw_mix, mix_images
from mixmae.trainer.engine.engine import build_model
from mixmae.trainer.recipe.schema import Data
from mixmae.trainer.telemetry.pictures import draw, reconstructions
from tests.helpers import tiny_recipe


def test_columns_are_mixed_input_sources_and_reconstructions() -> None:
    model = build_model(tiny_recipe(**{"model.num_images": 3, "train.micro_batch": 4}))
    images, mix = torch.randn(4, 3, 64, 64), draw_mix(4, 3, (2, 2), torch.Generator().manual_seed(0))
    grid = reconstructions(model, images, mix, rows=2)
    assert grid.shape == (2, 7, 3, 64, 64)
    assert torch.equal(grid[:, 0], mix_images(images, *mix)[:2])
    for k in range(3):
        source, guess = grid[:, 1 + 2 * k], grid[:, 2 + 2 * k]
        assert torch.equal(source, images[mix.partners[k, :2]])
        seen = (mix.groups == k).repeat_interleave(32, 0).repeat_interleave(32, 1)
        assert torch.equal(guess[..., seen], source[..., seen])
        assert not torch.equal(guess[..., ~seen], source[..., ~seen])


def test_a_perfect_prediction_is_the_image() -> None:
    model = build_model(tiny_recipe())
    images, mix = torch.rand(4, 3, 64, 64), draw_mix(4, 2, (2, 2), torch.Generator().manual_seed(0))
    from mixmae.models.methods.reconstruction import cells, normalise_cells

    target = normalise_cells(cells(images, 32))
    model.reconstruct = lambda images, groups, partners: (target[partners], model._visible(groups))  # type: ignore[method-assign]
    grid = reconstructions(model, images, mix, rows=4)
    torch.testing.assert_close(grid[:, 2], images)


def test_drawn_pixels_are_denormalised() -> None:
    settings = Data()
    grey = torch.zeros(1, 5, 3, 32, 32)
    picture = draw(grey, settings)
    expected = tuple(int(m * 255) for m in settings.mean)
    assert picture.getpixel((5, 30)) == expected
    assert picture.width == 5 * 32 + 4 * 4
