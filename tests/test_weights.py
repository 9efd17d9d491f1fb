"""Posteriors on the weights themselves: natural parameters add, and the Gaussian is that of the textbook."""

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence
from toys import F64, at, gap

from dualgp import WeightLayout, WeightPosterior, WeightSite, errors


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


LAYOUT = WeightLayout.of(net())
P = LAYOUT.size


def spread(seed: int, dense: bool) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(P, P, generator=g, dtype=F64)
    return root @ root.T if dense else root[0].square() + 0.1


def site(seed: int, dense: bool = False) -> WeightSite:
    return WeightSite(torch.randn(P, generator=torch.Generator().manual_seed(seed), dtype=F64), spread(seed, dense))


def matrix(A: torch.Tensor) -> torch.Tensor:
    return A if A.ndim == 2 else torch.diag(A)


def prior(dense: bool = False) -> WeightPosterior:
    precision = spread(7, True) + torch.eye(P, dtype=F64) if dense else spread(7, False)
    return WeightPosterior(LAYOUT, prior_mean=torch.linspace(-1, 1, P, dtype=F64), prior_precision=precision)


@pytest.mark.parametrize("prior_dense", [False, True])
@pytest.mark.parametrize("site_dense", [False, True])
def test_mean_variance_and_kl_are_those_of_the_textbook(prior_dense, site_dense):
    p, s = prior(prior_dense), site(1, site_dense)
    q = p.add(s)
    S0, S = matrix(p.precision), matrix(p.precision) + matrix(s.B)
    mean = torch.linalg.solve(S, S0 @ p.mean + s.lam)
    assert gap(q.mean, mean) < 1e-10
    assert gap(q.variance(), torch.linalg.inv(S).diagonal()) < 1e-10
    truth = kl_divergence(MultivariateNormal(mean, precision_matrix=S), MultivariateNormal(p.mean, precision_matrix=S0))
    assert gap(q.kl(), truth) < 1e-9
    assert gap(q.kl(p), truth) < 1e-9
    assert q.structure == ("dense" if prior_dense or site_dense else "diagonal")
    assert (
        gap(
            p.kl(q),
            kl_divergence(
                MultivariateNormal(p.mean, precision_matrix=S0), MultivariateNormal(mean, precision_matrix=S)
            ),
        )
        < 1e-8
    )


@pytest.mark.parametrize("dense", [False, True])
def test_verbs_are_arithmetic_on_sites(dense):
    p, a, b = prior(dense), site(1, dense), site(2, dense)
    q = p.add(a).add(b)
    assert gap(q.remove(b).mean, p.add(a).mean) < 1e-9
    assert gap(q.mean, p.add(a + b).mean) < 1e-9
    assert gap(q.scale(0.5).precision, p.add(0.5 * (a + b)).precision) < 1e-9
    assert gap(q.temper(4.0).mean, q.scale(0.25).mean) < 1e-12
    carried = p.add(a).as_prior().add(b)  # yesterday's posterior is today's prior
    assert gap(carried.mean, q.mean) < 1e-9
    assert gap(carried.precision, q.precision) < 1e-9
    assert p.add(a).remove(a).site is not None
    assert gap(p.add(a).remove(a).mean, p.mean) < 1e-9


def test_the_fractional_diagonals_of_a_worked_example():
    """Regression on x = −1 … 4 in two halves: the mean-field merge of its two posteriors, worked by hand."""
    layout = WeightLayout({"w": torch.Size([2])})
    A = WeightSite(at(13.0, 9.0) * at(0.984615384615385, 0.933333333333333), at(12.0, 8.0))
    B = WeightSite(at(13.0, 117.0) * at(0.4, 1.2), at(12.0, 116.0))
    q = WeightPosterior(layout, A + B, prior_precision=1.0)
    assert gap(q.precision, at(25.0, 125.0)) < 1e-12
    assert gap(q.mean, at(0.72, 1.1904)) < 1e-9


@pytest.mark.parametrize("dense", [False, True])
def test_draws_have_the_mean_and_covariance(dense):
    q = prior(dense).add(site(1, dense))
    draws = q.sample(200_000, generator=torch.Generator().manual_seed(0))
    S = matrix(q.precision)
    white = (draws - q.mean) @ torch.linalg.cholesky(S)  # of covariance I; its entries have sd ≤ √(2/n)
    assert gap(white.mean(0), torch.zeros(P, dtype=F64)) < 5 / 200_000**0.5
    assert gap(torch.cov(white.T), torch.eye(P, dtype=F64)) < 5 * (2 / 200_000) ** 0.5


def test_predictions_at_draws_are_those_of_networks_with_these_weights():
    network, x = net(), torch.randn(5, 2, dtype=F64)
    q, before = prior(), {k: v.clone() for k, v in network.state_dict().items()}
    found = q.predict_samples(network, x, 3, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(1)
    for f in found:
        other = net()
        other.load_state_dict(LAYOUT.split(q.sample(1, generator=g)[0]))
        assert gap(f, other(x).detach()) < 1e-12
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_batch_statistics_are_not_touched_by_prediction():
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    q = WeightPosterior(WeightLayout.of(network), prior_precision=100.0)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    q.predict_samples(network, torch.randn(8, 2), 2)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_layouts_split_and_join():
    network = net()
    flat = LAYOUT.join(network.state_dict())
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in LAYOUT.split(flat).items())
    scalar = WeightLayout({"a": torch.Size([]), "b": torch.Size([2, 2])})
    parts = scalar.split(torch.arange(10.0).reshape(2, 5))
    assert parts["a"].shape == (2,)
    assert parts["b"].shape == (2, 2, 2)
    assert list(WeightLayout.of(network, ["2.bias"]).shapes) == ["2.bias"]
    frozen = net()
    frozen[0].requires_grad_(False)
    assert list(WeightLayout.of(frozen).shapes) == ["2.weight", "2.bias"]


def test_the_mean_goes_into_a_network():
    network, q = net(), prior().add(site(1))
    q.load_mean_into(network)
    assert gap(LAYOUT.join(dict(network.named_parameters())), q.mean) == 0
    assert network[0].weight.requires_grad


def test_a_float32_posterior_stays_float32():
    q = WeightPosterior(LAYOUT, prior_precision=2.0).add(WeightSite(torch.ones(P), torch.ones(P)))
    assert q.mean.dtype == q.sample(2).dtype == q.variance().dtype == torch.float32
    assert q.to(dtype=F64).mean.dtype == F64
    assert gap(q.to(dtype=F64).mean, torch.full((P,), 1 / 3, dtype=F64)) < 1e-7


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: prior().remove(site(1) * 100), errors.NotPositiveDefiniteError, "smallest eigenvalue"),
        (lambda: prior(True).remove(site(1, True) * 100), errors.NotPositiveDefiniteError, "smallest eigenvalue"),
        (lambda: WeightPosterior(LAYOUT, prior_precision=torch.ones(3)), errors.InputError, "a number"),
        (
            lambda: WeightPosterior(LAYOUT, prior_precision=float("nan")),
            errors.InputError,
            "prior_precision must be a finite number",
        ),
        (lambda: WeightPosterior(LAYOUT, prior_precision=0.0), errors.NotPositiveDefiniteError, "eigenvalue 0"),
        (lambda: prior().add(WeightSite(torch.ones(2), torch.ones(2))), errors.BasisMismatchError, "weights"),
        (lambda: WeightSite(torch.ones(2), torch.ones(3)), errors.InputError, r"\[P, P\]"),
        (lambda: site(1) + WeightSite(torch.ones(2), torch.ones(2)), errors.BasisMismatchError, "2 weights"),
        (lambda: prior().scale(-1.0), errors.InputError, "factor by which .* must be ≥ 0 and finite"),
        (lambda: prior().temper(0.0), errors.InputError, "positive"),
        (lambda: prior().sample(0), errors.InputError, "num_samples"),
        (lambda: prior().load_mean_into(nn.Linear(2, 3)), errors.InputError, "0.weight"),
        (lambda: prior().predict_samples(nn.Linear(2, 3), torch.ones(1, 2), 1), errors.InputError, "0.weight"),
        (
            lambda: prior().kl(WeightPosterior(WeightLayout.of(nn.Linear(12, 1)), prior_precision=1.0)),
            errors.BasisMismatchError,
            "0.weight",
        ),
        (lambda: WeightLayout.of(net(), ["none"]), errors.InputError, "named_parameters"),
        (lambda: WeightLayout.of(nn.Tanh()), errors.InputError, "named_parameters"),
        (lambda: LAYOUT.join({}), errors.InputError, "nothing of that name"),
        (lambda: LAYOUT.join(net()[0].state_dict()), errors.InputError, "0.weight"),
    ],
)
def test_errors_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_improper_prior_becomes_proper_with_data():
    q = WeightPosterior(LAYOUT, site(1), prior_precision=0.0)
    assert gap(q.mean, site(1).lam / site(1).B) < 1e-12
    with pytest.raises(errors.NotPositiveDefiniteError):
        q.kl()
