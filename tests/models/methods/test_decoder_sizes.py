"""The decoder that nobody asked for fits the encoder, and a run's recipe says which it is."""

import pytest
import torch

from mixmae.models import create_encoder
from mixmae.models.methods.decoder import decoder_sizes
from mixmae.models.methods.mae import MAE
from mixmae.models.methods.mixmae import MixMAE
from mixmae.trainer.recipe.loading import parse_recipe
from mixmae.trainer.tasks.registry import task_of


@pytest.mark.parametrize(
    ("encoder", "sizes"),
    [
        ("mixmae_swin_base", (512, 8, 16)),
        ("mixmae_vit_base", (512, 8, 16)),
        ("mixmae_swin_small", (256, 4, 8)),
        ("mixmae_swin_tiny", (256, 4, 8)),
        ("mixmae_vit_small", (256, 4, 8)),
        ("mixmae_swin_nano", (64, 4, 2)),
    ],
)
def test_the_decoder_fits_the_encoder(encoder: str, sizes: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        model = create_encoder(encoder)
        methods: list[MixMAE | MAE] = [MixMAE(model), *([MAE(model)] if "vit" in encoder else [])]
    assert decoder_sizes(model) == sizes
    for method in methods:
        assert (method.decoder.embed.out_features, len(method.decoder.blocks)) == sizes[:2]
    settings = task_of(parse_recipe({"encoder": {"name": encoder}}, "a recipe")).recipe.method.settings
    assert (settings["decoder_dim"], settings["decoder_depth"], settings["decoder_num_heads"]) == sizes


@pytest.mark.parametrize(("dim", "heads"), [(512, 16), (96, 3), (48, 1), (16, 1), (80, 2)])
def test_heads_divide_a_width_that_is_given(dim: int, heads: int) -> None:
    with torch.device("meta"):
        assert decoder_sizes(create_encoder("mixmae_swin_nano"), dim) == (dim, 4, heads)
        assert decoder_sizes(create_encoder("mixmae_swin_nano"), dim, 2, 4) == (dim, 2, 4)


def test_sizes_that_do_not_fit_are_named_by_their_keys() -> None:
    from mixmae.base.errors import UsageError

    def refused(**sections: dict[str, object]) -> str:
        with torch.device("meta"), pytest.raises(UsageError) as raised:
            task_of(parse_recipe(sections, "a recipe")).build()
        return str(raised.value)

    assert refused(encoder={"img_size": 100}).startswith("encoder.img_size 100x100 does not divide into cells of 32 px")
    assert "encoder.window_size (7, 7) has 2 entries" in refused(encoder={"window_size": [7, 7]})
    assert "method.decoder_dim 30 does not divide by method.decoder_num_heads 4" in refused(
        method={"decoder_dim": 30, "decoder_num_heads": 4}
    )
