import multiprocessing.util
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings

from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.synthetic import Synthetic
from tests import helpers

pytest_plugins = ["tests.cluster.fixtures"]

# More threads than idle cores wait for each other, and a machine may be busy.
torch.set_num_threads(1)
settings.register_profile(
    "tests", max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")
# A shell's background job ignores Ctrl-C, and so would every command that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the tests and all that they start put what is temporary: processes that are killed leave it behind."""
    multiprocessing.util.get_temp_dir()  # made before, since multiprocessing removes its own when all is over
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)  # which is looked up once
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """54 synthetic images of 72 px in a few small shards."""
    out = tmp_path_factory.mktemp("corpus") / "shards"
    build_shards(Synthetic(54, 72, seed=0), out, shard_bytes=60_000, seed=0, jobs=1)
    return out


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a test puts into the environment is gone after it."""
    with mock.patch.dict(os.environ):
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    helpers.markers = {marker.name for marker in item.iter_markers()}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
