import json
from pathlib import Path

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from mixmae.base.errors import run_cli
from mixmae.models import create_encoder
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.synthetic import Synthetic
from mixmae.trainer.evaluation.probe import main, probe
from mixmae.trainer.export.encoder_directory import write_encoder_directory


def clusters(spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 16, generator=generator)
    labels = torch.arange(200) % 5
    return centres[labels] + spread * torch.randn(200, 16, generator=generator), labels


def test_separable_features_are_told_apart_and_noise_is_not() -> None:
    assert min(probe(*clusters(0.1))) == 1.0
    noise = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    assert max(probe(noise, torch.arange(2000) % 5)) < 0.27


def test_neighbours_agree_with_scikit_learn() -> None:
    x, labels = clusters(1.5)
    train, test = torch.randperm(200, generator=torch.Generator().manual_seed(0)).chunk(2)
    x = torch.nn.functional.normalize((x - x[train].mean(0)) / (x[train].std(0) + 1e-6))
    theirs = KNeighborsClassifier(10, weights=lambda d: 1 - d * d / 2).fit(x[train], labels[train])
    assert probe(*clusters(1.5)).knn == pytest.approx(theirs.score(x[test], labels[test]))


def test_command(shards: Path, tmp_path: Path) -> None:
    write_encoder_directory(
        tmp_path / "encoder", "mixmae_swin_nano", {}, create_encoder("mixmae_swin_nano").state_dict()
    )
    assert main([str(tmp_path / "encoder"), str(shards), "--json", str(tmp_path / "probe.json")]) == 0
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["classes"] == 18
    assert set(found["pretrained"]) == {"knn", "linear"}


def test_a_directory_without_encoder_is_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(main, [str(tmp_path), str(shards)]) == 2
    assert "mixmae export" in capsys.readouterr().err


@pytest.mark.parametrize("images", [1, 2, 3])
def test_too_few_images_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], images: int) -> None:
    build_shards(Synthetic(images, 32, seed=0), tmp_path / "shards", shard_bytes=60_000, seed=0, jobs=1)
    assert run_cli(main, [str(tmp_path), str(tmp_path / "shards")]) == 2
    assert f"holds {images} images; a probe needs 4" in capsys.readouterr().err
