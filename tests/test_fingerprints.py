"""Fingerprints of rows, and the multiset of them."""

import pytest
import torch

from dualgp.errors import InputError
from dualgp.fingerprints import Held, fingerprints


def test_equal_rows_agree_in_any_dtype_shape_and_batch_and_others_differ():
    x = torch.randn(2000, 3, 5)
    rows = fingerprints(x)
    assert len(rows.unique()) == 2000
    assert torch.equal(fingerprints(x.double()), rows)
    assert torch.equal(fingerprints(x.flatten(1)), rows)
    assert torch.equal(torch.cat([fingerprints(part) for part in x.split(77)]), rows)
    assert torch.equal(fingerprints(x[:, 0], x[:, 1:].flatten(1)), rows)
    assert not torch.isin(fingerprints(x, seed=1), rows).any()
    assert not torch.isin(fingerprints(x.flip(1)), rows).any()
    zero = torch.tensor([[0.0], [-0.0]])
    assert fingerprints(zero).unique().numel() == 1
    wide = torch.randn(3, 200_000)
    assert torch.equal(fingerprints(wide[:, :70_000], wide[:, 70_000:]), fingerprints(wide))


def test_bits_are_spread():
    """Each bit is set in half of the fingerprints of nearby integers, to five standard deviations."""
    rows = fingerprints(torch.arange(4000).double().unsqueeze(1))
    bits = (rows.unsqueeze(1) >> torch.arange(64)) & 1
    assert ((bits.double().mean(0) - 0.5).abs() < 5 * 0.5 / 4000**0.5).all()


def test_a_multiset_counts():
    a, b = torch.tensor([5, 3, 5, 9]), torch.tensor([3, 3, 1])
    held = Held.of(a, 7).add(b, 7)
    assert held.keys.tolist() == [1, 3, 5, 9]
    assert held.counts.tolist() == [1, 3, 2, 1]
    left = held.remove(torch.tensor([3, 5, 3, 3]))
    assert (left.keys.tolist(), left.counts.tolist()) == ([1, 5, 9], [1, 1, 1])
    with pytest.raises(InputError, match="2 of 3 .* The first is row 1"):
        left.remove(torch.tensor([1, 5, 5]))
    with pytest.raises(InputError, match="1 of 1"):
        left.remove(torch.tensor([3]))
