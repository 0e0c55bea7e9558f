"""What is done to a graph after PyTorch has exported it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.export.torch_export import _free_shape


@pytest.mark.parametrize(
    ("source", "wanted", "free"),
    [
        (["batch", 3, 2, 2], [-1, 12], [0, -1]),
        (["batch", 8, 1, 1], [-1, 8], [0, -1]),
        (["batch", 5, 12], [-1, 5, 4, 3], [0, 0, -1, 3]),
        (["batch", 5, 4, 3], [-1, 5, 12], [0, 0, -1]),
        (["batch", 4, 3], [-1, 4, 3, 1], [0, 0, 0, -1]),
        # The batch is split, merged, or not known to stay.
        (["batch", 4, 3], [-1, 6], None),
        ([8, 4, 3], [-1, 12], None),
        (["batch", "length", 12], [-1, 7, 12], None),
        (["batch", 4, 3], [2, -1], None),
        ([], [-1, 12], None),
    ],
)
def test_reshapes_that_keep_the_batch_hold_no_channel_count(source, wanted, free) -> None:
    assert _free_shape(source, wanted) == free


def reshaped(x: np.ndarray, shape: list[int]) -> np.ndarray:
    """As ONNX does: 0 copies a size of the input."""
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])


def merged(factors: list[int], cuts: list[bool]) -> list[int]:
    """Sizes that are products of neighbours, parted at the cuts."""
    found = [1]
    for factor, cut in zip(factors, cuts, strict=True):
        if cut:
            found.append(1)
        found[-1] *= factor
    return found


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5).flatmap(
        lambda factors: st.tuples(
            st.just(factors),
            *[st.lists(st.booleans(), min_size=len(factors), max_size=len(factors))] * 2,
        )
    ),
    st.integers(1, 5),
)
def test_they_give_what_they_gave(case, batch: int) -> None:
    factors, *cuts = case
    source, wanted = (merged(factors, cut) for cut in cuts)
    x = np.arange(batch * math.prod(factors)).reshape(batch, *source)
    free = _free_shape(["batch", *source], [-1, *wanted])
    assert free is not None and -1 in free
    np.testing.assert_array_equal(reshaped(x, free), x.reshape([-1, *wanted]))
