"""Greedy selection is the naive pivoted Cholesky, and never takes a point twice."""

import pytest
import reference as ref
import torch
from gpytorch.kernels import LinearKernel, RQKernel, ScaleKernel
from toys import F64, at, matern, rbf, waves

from dualgp import errors, greedy_variance


@pytest.mark.parametrize("count", [1, 7, 25])
def test_it_takes_the_pivots_of_a_pivoted_cholesky(count):
    x, *_ = waves(60, 2)
    expected = ref.pivoted_cholesky(ref.matern52(x, x, 0.8, 2.0), count)
    assert greedy_variance(matern(0.8, 2.0), x, count).tolist() == expected


def test_the_same_for_a_kernel_that_is_not_stationary():
    x, *_ = waves(40, 3)
    kernel = (ScaleKernel(RQKernel()) + LinearKernel()).double()
    expected = ref.pivoted_cholesky(kernel(x).to_dense().detach(), 12)
    assert greedy_variance(kernel, x, 12).tolist() == expected


def test_duplicated_inputs_are_taken_once():
    x, *_ = waves(15, 2)
    rows = greedy_variance(matern(0.8, 2.0), torch.cat([x, x, x]), 45)
    assert len(rows) == 15
    assert len(torch.cat([x, x, x])[rows].unique(dim=0)) == 15


def test_it_stops_where_nothing_is_left_to_explain():
    x, *_ = waves(40, 2)
    assert len(greedy_variance(LinearKernel().double(), x, 20)) == 2  # rank 2
    assert len(greedy_variance(matern(), torch.zeros(5, 1, dtype=F64), 5)) == 1
    assert len(greedy_variance(matern(), x, 20, tol=0.5)) < 20


def test_the_first_of_a_batch_of_kernels_decides():
    x, *_ = waves(30, 2)
    kernel = rbf(at(0.4, 3.0).reshape(2, 1, 1), at(1.0, 1.0), batch_shape=torch.Size([2]))
    assert torch.equal(greedy_variance(kernel, x, 6), greedy_variance(rbf(0.4, 1.0), x, 6))


def test_what_is_given_is_not_chosen_again_and_the_rest_follows_as_if_it_had_been():
    x, *_ = waves(60, 2)
    whole = greedy_variance(matern(), x, 20)
    after = greedy_variance(matern(), x, 12, given=x[whole[:8]])
    assert after.tolist() == whole[8:].tolist()


def test_a_factor_that_cannot_fit_is_refused():
    with pytest.raises(
        errors.InputError, match=r"A factor of 1000000 columns of 1000000 rows would take 7.45e\+03 GiB"
    ):
        greedy_variance(rbf(), torch.rand(10**6, 1), 10**6)


@pytest.mark.parametrize(("count", "match"), [(0, "at least 1, got 0"), (6, "at most the 5 inputs given, got 6")])
def test_more_than_there_are_is_refused(count, match):
    with pytest.raises(errors.InputError, match=match):
        greedy_variance(rbf(), torch.rand(5, 1), count)
