import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmae.trainer.data.order import Order, Quota, SampleRange, SampleRef, apportion


@st.composite
def orders(draw: st.DrawFn, drop_last: bool | None = None) -> tuple[Order, int]:
    """An order of any shape, and its global batch."""
    streams = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16, 48]))
    global_batch = streams * draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(sum))
    drop = draw(st.booleans()) if drop_last is None else drop_last
    if drop and sum(counts) < global_batch:
        counts.append(global_batch)
    seed, window = draw(st.integers(0, 2**32)), draw(st.integers(1, 50))
    return Order(seed, counts, streams, global_batch, window, drop), global_batch


@st.composite
def weighted_orders(draw: st.DrawFn) -> tuple[Order, list[float]]:
    """An order of several places, and their weights."""
    streams = draw(st.sampled_from([1, 2, 4, 8, 16]))
    places = draw(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=4))
    weights = [draw(st.floats(0.01, 10)) for _ in places]
    counts = [count for shards in places for count in shards]
    quotas = [Quota(len(s), n) for s, n in zip(places, apportion(sum(counts), weights), strict=True)]
    seed, window, per_batch = draw(st.integers(0, 2**32)), draw(st.integers(1, 50)), draw(st.integers(1, 4))
    return Order(seed, counts, streams, streams * per_batch, window, quotas=quotas), weights


def batches(order: Order, first: int, count: int, world_size: int = 1) -> list[list[SampleRef]]:
    """Global batches, put together from the ranks' slices."""
    share = order.streams // world_size
    return [
        [
            ref
            for rank in range(world_size)
            for ref in order.slice_of(batch, range(rank * share, (rank + 1) * share)).samples
        ]
        for batch in range(first, first + count)
    ]


@given(orders(drop_last=False), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_every_epoch_visits_every_sample_once(drawn: tuple[Order, int], epochs: int) -> None:
    order, global_batch = drawn
    enough = -(-epochs * order.num_samples // global_batch)
    seen = Counter(itertools.chain.from_iterable(batches(order, 0, enough)))
    # Streams enter an epoch one after the other: with whole epochs served, all of them have left it.
    whole = [t for t in seen if t.epoch < (enough * global_batch) // order.num_samples]
    epochs_seen = range(len(whole) // order.num_samples)
    assert sorted(whole) == [(e, s, e) for e in epochs_seen for s in range(order.num_samples)]
    assert set(seen.values()) == {1}
    assert len(whole) >= epochs * order.num_samples


@given(orders(drop_last=True), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_dropping_leaves_whole_batches_of_one_epoch(drawn: tuple[Order, int], epochs: int) -> None:
    order, global_batch = drawn
    per_epoch = order.num_samples // global_batch
    for epoch in range(epochs):
        refs = [t for batch in batches(order, epoch * per_epoch, per_epoch) for t in batch]
        assert {t.epoch for t in refs} == {epoch}
        assert len({t.sample for t in refs}) == len(refs) == per_epoch * global_batch


@given(orders(), st.integers(0, 60), st.data())
@settings(max_examples=150, deadline=None)
def test_any_place_is_computed_at_any_world_size(drawn: tuple[Order, int], first: int, data: st.DataObject) -> None:
    order, global_batch = drawn
    kept = order.kept_per_stream is not None
    again = Order(order.seed, order.counts.tolist(), order.streams, global_batch, order.shuffle_window, kept)
    divisors = [n for n in range(1, order.streams + 1) if order.streams % n == 0]
    expected = batches(order, 0, first + 3)[first:]
    assert batches(again, first, 3, data.draw(st.sampled_from(divisors))) == expected


@given(weighted_orders(), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_each_place_has_its_share_of_every_epoch(drawn: tuple[Order, list[float]], epochs: int) -> None:
    order, weights = drawn
    global_batch = order.streams * order.per_batch
    refs = [t for batch in batches(order, 0, -(-epochs * order.num_samples // global_batch)) for t in batch]
    ends = np.cumsum([quota.shards for quota in order.quotas])
    first_samples = [0, *(int(order.first_samples[end]) for end in ends)]
    seen: dict[int, list[int]] = {place: [] for place in range(len(weights))}
    for epoch in range(epochs):
        samples = [t.sample for t in refs if t.epoch == epoch]
        of_place = np.searchsorted(first_samples[1:], samples, side="right")
        for place, weight in enumerate(weights):
            count = int((of_place == place).sum())
            assert abs(count - order.num_samples * weight / sum(weights)) < 1
            seen[place] += [s for s, p in zip(samples, of_place, strict=True) if p == place]
    for place, samples in seen.items():
        # Gone through again and again: no image is seen twice more often than another of its place.
        counts = np.bincount(samples, minlength=first_samples[-1])[first_samples[place] : first_samples[place + 1]]
        assert counts.max() - counts.min() <= 1
    assert len({(t.sample, t.visit) for t in refs}) == len(refs)


@given(weighted_orders(), st.integers(0, 60), st.data())
@settings(max_examples=50, deadline=None)
def test_weighted_places_are_computed_at_any_world_size(
    drawn: tuple[Order, list[float]], first: int, data: st.DataObject
) -> None:
    order, _ = drawn
    again = Order(
        order.seed, order.counts.tolist(), order.streams, order.streams * order.per_batch, order.shuffle_window,
        quotas=order.quotas,
    )  # fmt: skip
    divisors = [n for n in range(1, order.streams + 1) if order.streams % n == 0]
    expected = batches(order, 0, first + 3)[first:]
    assert batches(again, first, 3, data.draw(st.sampled_from(divisors))) == expected


def test_places_are_mixed_in_every_batch() -> None:
    counts, quotas = [1000] * 10 + [50] * 2, [Quota(10, 5050), Quota(2, 5050)]
    order = Order(0, counts, streams=8, global_batch=64, shuffle_window=64, quotas=quotas)
    shares = [np.mean([t.sample >= 10_000 for t in batch]) for batch in batches(order, 0, 150)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.01)
    assert min(shares) > 0.25
    assert max(shares) < 0.75


def test_one_place_is_ordered_as_before_there_were_several() -> None:
    order = Order(5, [40, 7, 100, 23], streams=4, global_batch=8, shuffle_window=16)
    digest = hashlib.sha256(repr([(t.epoch, t.sample) for b in batches(order, 0, 60) for t in b]).encode())
    assert digest.hexdigest()[:16] == "ac69238205278869"


def test_sixteen_ranks_then_eight_then_sixteen() -> None:
    order = Order(3, [100] * 40, streams=32, global_batch=128, shuffle_window=20)
    expected = batches(order, 0, 60)
    fresh = [Order(3, [100] * 40, streams=32, global_batch=128, shuffle_window=20) for _ in range(3)]
    parts = [batches(o, f, 20, w) for o, f, w in zip(fresh, (0, 20, 40), (16, 8, 16), strict=True)]
    assert list(itertools.chain.from_iterable(parts)) == expected


def test_epochs_and_seeds_differ_and_classes_mix() -> None:
    def samples(seed: int, first: int) -> list[int]:
        return [t.sample for batch in batches(Order(seed, [50] * 8, 8, 40, 25), first, 10) for t in batch]

    first, second, other = samples(0, 0), samples(0, 10), samples(1, 0)
    assert sorted(first) == sorted(second) == sorted(other) == list(range(400))
    assert first != second
    assert first != other
    # Shards sorted by class: a global batch sees most of them, since each stream starts in another one.
    assert len({s // 50 for s in first[:40]}) >= 5


@given(orders())
@settings(max_examples=60, deadline=None)
def test_stretches_announce_each_sample_once_an_epoch_and_before_it_comes(drawn: tuple[Order, int]) -> None:
    order, global_batch = drawn
    announced: Counter[int] = Counter()
    served = 0
    for batch in range(2 * order.num_samples // global_batch + 2):
        refs, ahead = order.slice_of(batch, range(order.streams))
        for stretch in ahead:
            shard = np.searchsorted(order.first_samples, [stretch.first, stretch.last - 1], side="right")
            assert shard[0] == shard[1]
            announced.update(range(stretch.first, stretch.last))
        served += len(refs)
        assert {t.sample for t in refs} <= set(announced)
    if order.kept_per_stream is None:  # what was announced but not served yet lies in open windows
        assert announced.total() <= served + order.streams * order.shuffle_window


def test_reading_is_sequential() -> None:
    """A stream moves through its shards one way, a window at a time."""
    order = Order(0, [1000] * 8, streams=4, global_batch=64, shuffle_window=100)
    opened: list[SampleRange] = []
    for batch in range(order.num_samples // 64):
        opened += order.slice_of(batch, range(1, 2)).prefetch
    visit = order._visit(0, 0)
    places = [
        int(visit.shard_starts[np.flatnonzero(visit.shards == s.first // 1000)[0]]) + s.first % 1000 for s in opened
    ]
    inside = places[: places.index(max(places)) + 1]
    assert inside == sorted(inside)
    assert sum(s.last - s.first for s in opened) <= 1.05 * 2000 + 100


def test_a_far_place_is_found_at_once(benchmark_order: Order) -> None:
    refs = benchmark_order.slice_of(2 * 10**6, range(128)).samples
    assert len({t.sample for t in refs}) == 1024


@pytest.fixture
def benchmark_order() -> Order:
    return Order(0, [2300] * 557, streams=128, global_batch=1024, shuffle_window=256)
