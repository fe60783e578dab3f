"""Encoders and methods that do not go together: one line, which says what to change."""

import pytest

from mixmae.base.errors import UsageError
from mixmae.trainer.recipe.loading import default_recipe
from mixmae.trainer.tasks.registry import task_of

ONE_IMAGE = ("method.num_images=2", "method.separate_groups=false", "method.dual=false")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["resnet_nano", "method.name=mae"], "mae drops masked tokens, which ResNet cannot leave out; take a ViT or"),
        (["pvt_nano", "method.name=mae"], "which PVT cannot leave out"),
        (["twins_nano", "method.name=mae"], "which Twins cannot leave out"),
        (["swin_nano", "encoder.img_size=32", "method.num_images=2"], "a grid of 1x1 cells has no room for 2 images; "),
        (["resnet_nano", "encoder.img_size=64", "method.num_images=5"], "2x2 cells has no room for 5 images; raise "),
        (["swin_nano", "method.num_images=6"], "num_images is 6; expected 2 to 5"),
        (["swin_nano", *ONE_IMAGE, "method.fill=zero", "method.num_images=3"], "num_images is 3; set "),
        (["swin_nano", "method.fill=zoomin", "method.num_images=2"], "fill=zoomin would be seen by nothing; set "),
        (["swin_nano", "method.mix_embedding=true"], "mix_embedding tells images apart that are mixed"),
        (["swin_nano", "method.num_images=4", "train.micro_batch=2"], "micro"),
        (["vit_nano", "method.name=simmim", "method.mask_patch_size=24"], "mask_patch_size 24: expected a multiple of"),
        (["swin_nano", "method.name=simmim", "method.num_images=2"], "unknown key 'method.num_images'"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_one_line(overrides: list[str], message: str) -> None:
    encoder, *others = overrides
    sizes = [] if any("img_size" in key for key in others) else ["encoder.img_size=128"]
    with pytest.raises(UsageError) as caught:
        task_of(default_recipe([f"encoder.name=mixmae_{encoder}", *sizes, *others])).check()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
