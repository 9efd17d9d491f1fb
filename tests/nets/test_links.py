"""From Gaussians on logits to class probabilities."""

import pytest
import torch
from netproblems import F64, NET, SOFTMAX, TAU, TEST, X, Y, gap
from toys import unchecked

from dualgp import errors, network_gp
from dualgp.nets.links import class_log_probs


def problem(n: int = 6, C: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    root = torch.randn(n, C, C, dtype=F64)
    return 2 * torch.randn(n, C, dtype=F64), root @ root.mT


@pytest.mark.parametrize("link", ["probit", "mc", "bridge"])
def test_probabilities_sum_to_one_and_are_the_softmax_of_a_certain_mean(link):
    mean, cov = problem()
    assert gap(class_log_probs(mean, cov, link).exp().sum(-1), torch.ones(6, dtype=F64)) < 1e-12
    if link != "bridge":
        assert gap(class_log_probs(mean, 0 * cov, link), mean.log_softmax(-1)) < 1e-7


@pytest.mark.parametrize("link", ["probit", "mc"])
def test_a_shift_common_to_all_logits_is_no_matter(link):
    mean, cov = problem()
    shifted = class_log_probs(mean + 3.0, cov + 50.0, link)
    assert gap(class_log_probs(mean, cov, link), shifted) < 1e-12


def test_draws_tend_to_the_expectation():
    mean, cov = problem()
    root = torch.linalg.cholesky(cov)
    f = mean + (root @ torch.randn(200_000, 6, 4, 1, dtype=F64)).squeeze(-1)
    exact = f.softmax(-1).mean(0)
    got = class_log_probs(mean, cov, "mc", num_samples=100_000).exp()
    assert gap(got, exact) < 5e-3
    assert gap(class_log_probs(mean, cov, "probit").exp(), exact) < 0.2
    one = class_log_probs(mean[2:3], cov[2:3], "mc", num_samples=100_000).exp()
    assert gap(one, got[2:3]) < 1e-12  # draws are common to all data


def test_the_probit_link_of_independent_logits_of_one_variance_is_the_usual_one():
    mean, _ = problem()
    got = class_log_probs(mean, 2.0 * torch.eye(4, dtype=F64).expand(6, 4, 4))
    assert gap(got, (mean / (1 + torch.pi / 8 * 2.0) ** 0.5).log_softmax(-1)) > 0  # of the centred mean:
    centred = mean - mean.mean(-1, keepdim=True)
    assert gap(got, (centred / (1 + torch.pi / 8 * 2.0) ** 0.5).log_softmax(-1)) < 1e-12


def test_the_bridge_is_the_dirichlet_of_laplace_torch():
    """Hobbhahn et al. 2022 with the correction to Σf = 0, in the words of their formula."""
    mean, cov = problem()
    K = 4
    total = cov.sum((1, 2)).reshape(-1, 1)
    m = mean - cov.sum(-1) * mean.sum(-1, keepdim=True) / total
    V = cov - torch.einsum("bi,bj->bij", cov.sum(-1), cov.sum(-2)) / total.unsqueeze(-1)
    alpha = (1 - 2 / K + m.exp() / K**2 * (-m).exp().sum(1, keepdim=True)) / V.diagonal(dim1=1, dim2=2)
    assert gap(class_log_probs(mean, cov, "bridge").exp(), alpha / alpha.sum(1, keepdim=True)) < 1e-12


def test_links_of_a_posterior():
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU)
    mean, cov = q.predict_blocks(TEST)
    for link in ("probit", "mc", "bridge"):
        p = q.predict_likelihood(TEST, link=link)
        assert gap(p.logits, class_log_probs(mean, cov, link)) < 1e-12
        assert gap(q.log_predictive(TEST, Y[:7], link=link), p.log_prob(Y[:7])) < 1e-12
    a = q.predict_likelihood(TEST, link="mc", generator=torch.Generator().manual_seed(1)).probs
    b = q.predict_likelihood(TEST, link="mc", generator=torch.Generator().manual_seed(2)).probs
    assert 0 < gap(a, b) < 0.1
    assert gap(q.predict_likelihood(TEST).probs, NET(TEST).softmax(-1).detach()) > 0.01
    with unchecked(), pytest.raises(errors.InputError, match="link"):
        q.predict_likelihood(TEST, link="softmax")
