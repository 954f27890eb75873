"""Leaves on disk (chipmunk_jax.models.weights)."""

import weakref

import numpy as np

from chipmunk_jax.models.weights import Leaf, read_leaves, shapes_in, stored_bytes, weights_of, write_leaves


def test_leaves_are_made_and_written_one_at_a_time(tmp_path):
    alive, most = weakref.WeakSet(), 0

    class Array(np.ndarray):  # a plain one takes no attribute
        pass

    class Owner:  # goes when its array goes
        pass

    def make(value):
        nonlocal most
        array = np.full((3, 5), value, np.float32).view(Array)
        array.owner = Owner()
        alive.add(array.owner)
        most = max(most, len(alive))
        return array

    leaves = {f"a.b{i}": Leaf((3, 5), np.dtype(np.float32), lambda i=i: make(i)) for i in range(20)}
    write_leaves(leaves, tmp_path)
    assert most <= 2
    assert shapes_in(tmp_path) == dict.fromkeys(leaves, (3, 5)) and stored_bytes(tmp_path) > 0
    assert weights_of(tmp_path).is_dir()
    read = read_leaves(tmp_path, dict.fromkeys(leaves, np.zeros((3, 5), np.float32)))
    np.testing.assert_array_equal(read["a.b7"], np.full((3, 5), 7))
