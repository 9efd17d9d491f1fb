"""Bad input: an error that says what was expected and what came."""

import pytest
import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from jacobians import mlp
from leaning import F64, at_optimum
from toys import at, gaussian, line, random_sites, rbf, unchecked

from dualgp import InducingBasis, Posterior, Sites, errors
from dualgp.influence import (
    DiagonalPosterior,
    leave_group_out,
    leave_one_out,
    leverage,
    mislabelled,
    perturb,
    preconditioner_variance,
    removal_shift,
    sensitivity,
    sum_by,
)
from dualgp.kernels import NetworkJacobian
from dualgp.likelihoods import LogitBernoulliLikelihood

X, SITES, Y = line(-1, 1, 6), random_sites(6), at(0, 1, 0, 1, 1, 0)
Q = Posterior(InducingBasis(rbf(), line(-1, 1, 3))).add(X, SITES)
THREE = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
V = torch.eye(2, dtype=F64).expand(4, 2, 2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: leverage(Q, X[:5], SITES), "5 inputs and 6 sites"),
        (lambda: sensitivity(Q, X[:0], SITES[:0]), "0 inputs and 0 sites"),
        (lambda: leverage(Q, X, random_sites(6, 2, multi=True)), "1 outputs, the sites 2"),
        (lambda: leverage(Q, X, random_sites(2, 6)), r"one process at a time.*got \(2, 6\)"),
        (lambda: leverage(Q, X.float(), SITES), "torch.float64.*got torch.float32"),
        (lambda: sensitivity(Q, X, SITES, order="second"), 'order must be "removal" or "first", got \'second\''),
        (lambda: sensitivity(Q, X, SITES, max_hat=1.0), "max_hat must be below 1, got 1.0"),
        (lambda: removal_shift(V, torch.ones(4, 3), V), r"alpha \[\.\.\., C\], got .*\(4, 3\)"),
        (lambda: removal_shift(V, torch.ones(4, 2), V[:3]), r"\(3, 2, 2\)"),
        (lambda: perturb(Q, X, SITES, torch.ones(5)), r"shape \[6\], got \(5,\)"),
        (lambda: sum_by(torch.ones(3), torch.tensor([0, 1])), "one label per value, got 2 and 3"),
        (lambda: sum_by(torch.ones(2), torch.tensor([0, 4]), 3), "0 … 2, got 0 … 4"),
        (lambda: sum_by(torch.ones(2), torch.tensor([-1, 0])), "0 … 0, got -1 … 0"),
        (lambda: leave_one_out(Q, X, Y[:4], SITES, gaussian()), r"shape \(6,\), got \(4,\)"),
        (lambda: leave_one_out(Q, X, Y + 1, SITES, LogitBernoulliLikelihood()), "expects targets 0 or 1"),
        (lambda: leave_one_out(Q, X, Y, SITES, THREE), "has 3 outputs, but the sites"),
        (lambda: leave_one_out(Q, X, Y, SITES, gaussian(), noise=at(1.0)), "noise must have one value for each of 6"),
        (lambda: groups([]), "There is no group"),
        (lambda: groups([[0], []]), "Group 1 must be a list of at least one index"),
        (lambda: groups([[[0, 1]]]), r"Group 0 .*got shape \(1, 2\)"),
        (lambda: groups([[0, 6]]), "Group 0 must index 0 … 5, got 0 … 6"),
        (lambda: groups([[-1]]), "got -1 … -1"),
        (lambda: groups([[1, 1]]), "holds an index twice"),
        (lambda: groups([torch.ones(6, dtype=torch.bool)]), "take .nonzero"),
        (lambda: groups([at(0.0, 1.0)]), "integer indices, got torch.float64"),
        (lambda: mislabelled(leave_one_out(Q, X, Y, SITES, gaussian()), 7), "between 1 and 6, got 7"),
    ],
)
def test_refused(call, match):
    with pytest.raises(errors.InputError, match=match), unchecked():
        call()


def groups(groups):
    return leave_group_out(Q, X, Y, SITES, gaussian(), groups)


def test_labels_outside_the_likelihood():
    net, x = mlp(), torch.zeros(4, 2, dtype=F64)
    sites = Sites(torch.zeros(4, 3, dtype=F64), torch.eye(3, dtype=F64).expand(4, 3, 3), multi_output=True)
    with pytest.raises(errors.InputError, match=r"0 … 2; 1 of 4 are not, the first being 3"):
        leave_one_out(at_optimum(net, x, sites, 1.0), x, torch.tensor([0, 1, 3, 2]), sites, THREE)


def test_more_than_was_added_leaves_no_gaussian():
    with pytest.raises(errors.NotPositiveDefiniteError, match="smallest eigenvalue"):
        perturb(Q, X, SITES, 3.0)


@pytest.mark.parametrize("variance", [torch.ones(5), -torch.ones(27), torch.full((27,), torch.inf)])
def test_variances_of_a_diagonal_posterior(variance):
    with pytest.raises(errors.InputError, match="Expected 27 variances"):
        DiagonalPosterior(NetworkJacobian(mlp(), torch.zeros(2, 2, dtype=F64)), variance)


def test_optimisers_that_say_nothing():
    p, other = torch.nn.Parameter(at(1.0)), torch.nn.Parameter(at(1.0))
    adam = torch.optim.Adam([p])
    options = {"num_data": 10, "prior_precision": 1.0}
    with pytest.raises(errors.InputError, match="has taken no step on parameter 0"):
        preconditioner_variance(adam, [p], **options)
    with pytest.raises(errors.InputError, match="Parameter 1, .* is not one that the optimiser holds"):
        preconditioner_variance(torch.optim.SGD([p]), [p, other], **options)
    with pytest.raises(errors.InputError, match="no parameters"):
        preconditioner_variance(adam, [], **options)
    with pytest.raises(errors.InputError, match="must be positive"):
        preconditioner_variance(adam, [p], num_data=0, prior_precision=1.0)
    with pytest.raises(errors.UnsupportedError, match="Adagrad is not known here"):
        preconditioner_variance(torch.optim.Adagrad([p]), [p], **options)
