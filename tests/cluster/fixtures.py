"""Session-scoped pytest fixtures of clusters."""

import os
from collections.abc import Callable, Iterator

import pytest

from tests.cluster import programs
from tests.cluster.cluster import Cluster, bring_up
from tests.helpers import lacks


@pytest.fixture(scope="session")
def cluster_of() -> Iterator[Callable[[int], Cluster]]:
    """A function from a number of hosts to a cluster of that size with two slots per host; cached for the session."""
    made: dict[int, Cluster] = {}

    def get(hosts: int) -> Cluster:
        if reason := programs.missing():
            lacks(reason)
        if hosts not in made:
            made[hosts] = bring_up(f"pytest-{os.getpid()}-{hosts}", hosts, slots=2, with_parent=True)
        return made[hosts]

    yield get
    for cluster in made.values():
        cluster.down()


@pytest.fixture(scope="session")
def cluster(cluster_of: Callable[[int], Cluster]) -> Cluster:
    """A cluster of two hosts with two slots per host."""
    return cluster_of(2)


@pytest.fixture
def repaired(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, repaired after the test."""
    yield cluster
    cluster.repair()
