"""MixMAE with a teacher against its definition, cell by cell, and that nothing of the teacher is trained or kept."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.models import MixMAE, create_encoder
from mixmae.models.methods.distill import MixMAEDistill
from mixmae.models.methods.teacher import Teacher, open_teacher
from mixmae.trainer.planning.activation_memory import buffer_bytes
from mixmae.trainer.planning.states import Limits, count_parameters
from mixmae.trainer.tasks.registry import task_of
from tests.helpers import tiny_recipe
from tests.models.methods.teachers import MEAN, STD, small_teacher, write_teacher

DECODER: dict[str, Any] = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


@pytest.fixture(scope="module")
def teacher() -> str:
    return small_teacher()


def build(teacher: str, **changes: Any) -> MixMAEDistill:
    torch.manual_seed(0)
    return MixMAEDistill(create_encoder("mixmae_swin_nano"), teacher, **{"num_images": 3, **DECODER, **changes})


@pytest.mark.parametrize("group_map", ["micro_batch", "sample"])
def test_loss_is_that_of_the_definition(teacher: str, group_map: str) -> None:
    model, images = build(teacher, group_map=group_map, teacher_weight=0.5), torch.randn(3, 3, 128, 128)
    own_mean, own_std = (0.1, 0.2, 0.3), (0.9, 0.8, 0.7)
    model.set_normalisation(own_mean, own_std)
    groups, partners = model.draw(3, torch.Generator().manual_seed(1))
    plain = MixMAE(create_encoder("mixmae_swin_nano"), num_images=3, group_map=group_map, **DECODER)  # type: ignore[arg-type]
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("teacher_head")})
    alone = timm.create_model(teacher, pretrained=True).eval()
    pixels = [torch.stack([image[c] * own_std[c] + own_mean[c] for c in range(3)]) for image in images]
    theirs = [torch.stack([(of_image[c] - MEAN[c]) / STD[c] for c in range(3)]) for of_image in pixels]
    tokens = [alone.forward_features(of_image[None])[0, 1:] for of_image in theirs]
    expected: list[Tensor] = []
    mixed = model._encode(images, groups, partners)
    for i in range(3):
        for row in range(4):
            for col in range(4):
                group = groups[i, row, col] if group_map == "sample" else groups[row, col]
                token = tokens[int(partners[group, i])][row * 4 + col]
                target = (token - token.mean()) / (token.var(correction=0) + 1e-5).sqrt()
                expected.append((model.teacher_head(mixed[i, row, col]) - target).square().mean())
    loss = model(images, groups, partners)
    whole = plain(images, groups, partners) + 0.5 * torch.stack(expected).mean()
    torch.testing.assert_close(loss, whole, atol=1e-5, rtol=1e-5)


def test_cells_count_by_their_valid_pixels(teacher: str) -> None:
    model, images = build(teacher), torch.randn(3, 3, 128, 128)
    groups, partners = model.draw(3, torch.Generator().manual_seed(1))
    valid = torch.ones(3, 128, 128, dtype=torch.bool)
    torch.testing.assert_close(model(images, groups, partners, valid), model(images, groups, partners))
    valid[1, :64] = False
    valid[1, 64:96, :16] = False
    features, targets = model.teacher_head(model._encode(images, groups, partners)), model.teacher(images)
    total, weight = torch.zeros(()), 0.0
    for i in range(3):
        for row in range(4):
            for col in range(4):
                source = int(partners[groups[row, col], i])
                share = 1.0 if source != 1 or row == 3 else 0.0 if row < 2 else 0.5 if col == 0 else 1.0
                error = (features[i, row, col] - targets[source, :, row, col]).square().mean()
                total, weight = total + share * error, weight + share
    whole, without = model(images, groups, partners, valid), model.as_counted()
    without.separate_groups = True
    torch.testing.assert_close(whole - without(images, groups, partners, valid), total / weight, atol=1e-5, rtol=1e-5)


def test_nothing_of_the_teacher_is_trained_or_kept(teacher: str) -> None:
    model, images = build(teacher), torch.randn(3, 3, 128, 128)
    names = [*dict(model.named_parameters()), *model.state_dict(), *dict(model.named_modules())]
    assert {name for name in names if "teacher" in name} == {"teacher_head", "teacher_head.weight", "teacher_head.bias"}
    before = {name: value.clone() for name, value in model.teacher.model.state_dict().items()}
    model.train()(images, *model.draw(3, torch.Generator())).backward()
    assert all(parameter.grad is None for parameter in model.teacher.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.teacher.model.state_dict().items())
    assert not model.teacher.model.training
    model.bfloat16()
    assert {parameter.dtype for parameter in model.teacher.model.parameters()} == {torch.bfloat16}


def test_a_student_begins_as_it_does_without_a_teacher(teacher: str) -> None:
    model = build(teacher)
    torch.manual_seed(0)
    plain = MixMAE(create_encoder("mixmae_swin_nano"), num_images=3, **DECODER)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())


def test_features_are_resampled_to_the_students_grid(tmp_path: Path) -> None:
    fine = open_teacher(f"local-dir:{write_teacher(tmp_path / 'fine', img_size=96, patch_size=16)}")
    features = Teacher(fine, (4, 4))(torch.randn(2, 3, 128, 128))
    assert features.shape == (2, 24, 4, 4)
    torch.testing.assert_close(features.mean(1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)


def test_a_plan_counts_the_teachers_memory_and_not_its_operations(teacher: str) -> None:
    with torch.device("meta"):
        model = build(teacher)
    frozen = sum(4 * weight.numel() for weight in model.teacher.model.parameters())
    assert count_parameters(model, Limits()).buffers == buffer_bytes(model) + frozen
    assert frozen > 0
    counted = model.as_counted()
    with torch.device("meta"):
        inputs = [tensor.to("meta") for tensor in model.draw(3, torch.Generator())]
        assert counted(torch.empty(3, 3, 128, 128), *inputs).shape == ()


def test_teachers_that_cannot_be_opened_are_one_line(tmp_path: Path) -> None:
    for teacher, message in {
        "vit_none": "teacher vit_none cannot be opened with its weights: .*; take a name of timm.list_models",
        f"local-dir:{tmp_path / 'none'}": "teacher local-dir:.* cannot be opened",
    }.items():
        task = task_of(tiny_recipe(method={"name": "mixmae_distill", "teacher": teacher}))
        with pytest.raises(UsageError, match=message) as caught:
            task.build()
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"method\.teacher"):
        task_of(tiny_recipe(method={"name": "mixmae_distill"}))


def test_targets_of_cells_are_about_as_large_as_those_of_pixels(teacher: str) -> None:
    model = build(teacher)
    features = model.teacher(torch.randn(4, 3, 128, 128))
    assert 0.9 < F.mse_loss(features, torch.zeros_like(features)) < 1.1
