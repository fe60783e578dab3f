import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier, RidgeClassifierCV
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from mixmae.base.errors import UsageError, run_cli
from mixmae.models import create_encoder
from mixmae.trainer.data.faults import Reason
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.synthetic import Synthetic
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.evaluation.features import effective_rank, mean_cosine
from mixmae.trainer.evaluation.knn import Bank, nearest, ranking
from mixmae.trainer.evaluation.probe import check_probe_shards, main, probe
from mixmae.trainer.evaluation.ridge import ALPHAS, fit_ridge
from mixmae.trainer.export.encoder_directory import write_encoder_directory


def clusters(spread: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 16, generator=generator)
    labels = torch.arange(200) % 5
    return centres[labels] + spread * torch.randn(200, 16, generator=generator), labels


def test_separable_features_are_told_apart_and_noise_is_not() -> None:
    told = probe(*clusters(0.1))
    assert (told["knn"], told["linear"]) == (1.0, 1.0)
    noise = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    told = probe(noise, torch.arange(2000) % 5)
    assert max(told["knn"], told["linear"]) < 0.27


def test_neighbours_agree_with_scikit_learn() -> None:
    x, labels = clusters(1.5)
    known, queries = torch.nn.functional.normalize(x[:120]), torch.nn.functional.normalize(x[120:])
    neighbours = nearest(Bank(x[:120], labels[:120]), x[120:], 20, Ranks())
    for k in (1, 5, 20):
        theirs = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d * d / 2) / 0.07)).fit(known, labels[:120])
        assert ranking(neighbours, k, 5)[:, 0].tolist() == theirs.predict(queries).tolist()


def test_more_neighbours_than_images_are_all_of_them() -> None:
    neighbours = nearest(Bank(torch.eye(3), torch.tensor([2, 0, 1])), torch.eye(3)[:1], 5, Ranks())
    assert neighbours.cosine.tolist() == [[1.0, 0.0, 0.0, -torch.inf, -torch.inf]]
    assert ranking(neighbours, 5, 3).tolist() == [[2]]


@pytest.mark.parametrize("images", [12, 150])
def test_ridge_agrees_with_scikit_learn(images: int) -> None:
    """Fewer images than features, and more."""
    x, labels = clusters(1.5)
    x, queries, labels = x[:images].double(), x[150:].double(), labels[:images]
    ours = fit_ridge(x, labels, 5)
    assert ours.alpha == RidgeClassifierCV(alphas=ALPHAS).fit(x, labels).alpha_
    theirs = RidgeClassifier(alpha=ours.alpha).fit(x, labels)
    scores = queries @ ours.weight + ours.bias
    assert np.allclose(2 * scores - 1, theirs.decision_function(queries), atol=1e-8)  # their targets are -1 and 1
    assert ours.predict(queries).tolist() == theirs.predict(queries).tolist()


def test_collapse_shows_without_labels() -> None:
    spread = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    collapsed = torch.ones(500, 16) + 1e-3 * spread
    assert 15 < effective_rank(spread) <= 16
    assert effective_rank(torch.ones(500, 16)) == pytest.approx(1.0, abs=1e-3)
    assert effective_rank(collapsed) < 1.2
    assert mean_cosine(collapsed) > 0.999
    pairs = np.corrcoef(spread - spread.mean(1, keepdim=True))  # of centred rows, the correlation is the cosine
    expected = pairs[~np.eye(500, dtype=bool)].mean()
    assert mean_cosine(spread - spread.mean(1, keepdim=True)) == pytest.approx(expected, abs=1e-6)
    assert set(probe(spread, None)) == {"effective_rank", "mean_cosine"}


def test_features_that_are_not_finite_have_no_figures() -> None:
    x, labels = clusters(0.1)
    x[3, 4] = torch.nan
    told = probe(x, labels)
    assert set(told) == {"knn", "linear", "effective_rank", "mean_cosine"}
    assert all(np.isnan(value) for value in told.values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": [0, 1, -1, 1]}, "a probe needs a label for every image"),
        ({"label": [3, 3, 3, 3]}, "have the label 3; a probe needs two classes or more"),
        ({"state": Reason.DAMAGED}, "a probe reads every image, but 4 of 4"),
    ],
)
def test_shards_that_cannot_be_probed(shards: Path, changed: dict[str, object], message: str) -> None:
    index = open_index(shards)
    samples = index.samples[:4].copy()
    for column, values in changed.items():
        samples[column] = values
    with pytest.raises(UsageError, match=message):
        check_probe_shards(ShardIndex(index.store, index.shards, index.classes, samples, ""), "a probe")


def test_command(shards: Path, tmp_path: Path) -> None:
    write_encoder_directory(
        tmp_path / "encoder", "mixmae_swin_nano", {}, create_encoder("mixmae_swin_nano").state_dict()
    )
    assert main([str(tmp_path / "encoder"), str(shards), "--json", str(tmp_path / "probe.json")]) == 0
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["classes"] == 18
    assert {"knn", "linear"} < set(found["pretrained"])


def test_a_directory_without_encoder_is_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(main, [str(tmp_path), str(shards)]) == 2
    assert "mixmae export" in capsys.readouterr().err


def test_one_image_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_shards(Synthetic(1, 32, seed=0), tmp_path / "shards", shard_bytes=60_000, seed=0, jobs=1)
    assert run_cli(main, [str(tmp_path), str(tmp_path / "shards")]) == 2
    assert "holds one image; a probe needs some to learn from and some to test on" in capsys.readouterr().err
