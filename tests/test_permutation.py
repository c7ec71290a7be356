"""The order of many examples: a permutation that is computed in parts."""

import tracemalloc

import numpy as np
import pytest
from scipy import stats

from polus.data import arrays, from_arrays
from polus.data.permutation import CHUNK, ROUNDS, Permutation

pytestmark = pytest.mark.once


def keys(seed, epoch=0):
    return np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(ROUNDS)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 1000, 2**12, 2**12 + 1, 3 * CHUNK + 17])
def test_each_number_comes_once(size):
    order = Permutation(size, keys(3))[:]
    assert np.array_equal(np.sort(order), np.arange(size))


def test_each_place_is_what_the_network_says():
    """The same in Python's integers, which have no overflow to hide a mistake."""
    size, mask = 2**20 + 77, 2**64 - 1
    bits = (size - 1).bit_length()

    def mixed(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    def permuted(i):
        while True:
            wide, narrow = bits - bits // 2, bits // 2
            left, right = i >> narrow, i % 2**narrow
            for key in map(int, keys(5, 9)):
                left, right = right, left ^ (mixed((right + key) & mask) % 2**wide)
                wide, narrow = narrow, wide
            if (i := (left << narrow) + right) < size:
                return i

    order = Permutation(size, keys(5, 9))
    for i in (0, 1, 2, CHUNK - 1, CHUNK, 2**20, size - 1):
        assert order[i : i + 1].tolist() == [permuted(i)]


def test_parts_are_those_of_the_whole():
    order, whole = Permutation(300_000, keys(1)), Permutation(300_000, keys(1))[:]
    for start, stop in ((0, 10), (299_990, 300_000), (5, 200_000), (100_000, 100_000), (70, 90)):
        np.testing.assert_array_equal(order[start:stop], whole[start:stop])
    assert order[299_990:400_000].tolist() == whole[299_990:].tolist()
    assert Permutation(2**31 + 5, keys(1))[2**31 :].dtype == np.int64


def test_orders_look_random():
    """Of 2,000 orders: where number 0 goes, what follows on what; and of one, its correlations."""
    size, count = 37, 2_000
    orders = np.array([Permutation(size, keys(seed))[:] for seed in range(count)])
    uniform = np.full(size, count / size)
    for place in (0, 1, size - 1):
        assert stats.chisquare(np.bincount(orders[:, place], minlength=size), uniform).pvalue > 1e-4
    steps = (orders[:, 1] - orders[:, 0]) % size
    expected = np.full(size - 1, count / (size - 1))
    assert stats.chisquare(np.bincount(steps, minlength=size)[1:], expected).pvalue > 1e-4
    large = Permutation(2**20 + 1, keys(0))[:].astype(float)
    for shift in (1, 2, 1024):
        assert abs(np.corrcoef(large[:-shift], large[shift:])[0, 1]) < 0.005
    other = Permutation(2**20 + 1, keys(0, 1))[:].astype(float)
    assert abs(np.corrcoef(large, other)[0, 1]) < 0.005


def test_many_examples_take_no_memory_and_an_epoch_begins_at_once():
    examples = np.broadcast_to(np.float32(1), (10**9,))
    data = from_arrays(examples, 64, device_bytes=0)
    tracemalloc.start()
    found = [next(data.rows(epoch, skip=10**6)) for epoch in range(3)]
    in_order = next(from_arrays(examples, 64, shuffle=False, device_bytes=0).rows(0, skip=10**6))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24
    assert len({tuple(rows) for rows in found}) == 3
    assert all(0 <= row < 10**9 for rows in found for row in rows)
    assert in_order.tolist() == list(range(64 * 10**6, 64 * 10**6 + 64))


def test_a_run_sees_each_of_many_examples_once(monkeypatch):
    monkeypatch.setattr(arrays, "MAX_SORTED", 50)
    data = from_arrays(np.arange(103), 10)
    first, second = (np.concatenate(list(data.rows(epoch))) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(103))
    assert first.tolist() != second.tolist()
    np.testing.assert_array_equal(np.concatenate(list(data.rows(1, skip=4))), second[40:])
