import torch

from mixmae.models.methods.contract import Column
from mixmae.models.methods.mixing import draw_mix, mix_images
from mixmae.models.methods.mixmae import MixMAE
from mixmae.models.methods.reconstruction_loss import normalize_patches, patchify
from mixmae.trainer.recipe.sections.data import Data
from mixmae.trainer.tasks.registry import build_model
from mixmae.trainer.telemetry.pictures import draw_columns
from tests.helpers import tiny_recipe


def mixmae(num_images: int) -> MixMAE:
    model = build_model(tiny_recipe(**{"method.num_images": num_images, "train.micro_batch": 4}))
    assert isinstance(model, MixMAE)
    return model


def test_columns_are_mixed_input_sources_and_reconstructions() -> None:
    model = mixmae(3)
    images, mix = torch.randn(4, 3, 64, 64), draw_mix(4, 3, (2, 2), torch.Generator().manual_seed(0))
    columns = model.reconstruct(images, *mix, rows=2)
    assert [column.images.shape for column in columns] == [(2, 3, 64, 64)] * 7
    assert [column.title for column in columns[:3]] == ["mixed input", "image 1", "reconstructed 1"]
    assert torch.equal(columns[0].images, mix_images(images, *mix)[:2])
    for k in range(3):
        source, painted = columns[1 + 2 * k].images, columns[2 + 2 * k].images
        assert torch.equal(source, images[mix.partners[k, :2]])
        seen = (mix.groups == k).repeat_interleave(32, 0).repeat_interleave(32, 1)
        assert torch.equal(painted[..., seen], source[..., seen])
        assert not torch.equal(painted[..., ~seen], source[..., ~seen])


def test_a_perfect_prediction_is_the_image() -> None:
    model = mixmae(2)
    images, mix = torch.rand(4, 3, 64, 64), draw_mix(4, 2, (2, 2), torch.Generator().manual_seed(0))
    target = normalize_patches(patchify(images, 32))
    visible = model.predict(images, *mix)[1]
    model.predict = lambda images, groups, partners, *drawn: (target[partners], visible)  # type: ignore[method-assign]
    torch.testing.assert_close(model.reconstruct(images, *mix)[2].images, images)


def test_drawn_pixels_are_denormalised() -> None:
    settings = Data()
    picture = draw_columns([Column(str(n), torch.zeros(1, 3, 32, 32)) for n in range(5)], settings)
    expected = tuple(int(m * 255) for m in settings.mean)
    assert picture.getpixel((5, 30)) == expected
    assert picture.width == 5 * 32 + 4 * 4
