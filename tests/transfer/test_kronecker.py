"""Kronecker posteriors are the dense ones of the same sums, in mean, variances and draws, multiplied out or not."""

import math

import pytest
import torch
from sitemodels import F64, softmax_likelihood
from torch import Tensor, nn
from toys import gap

from dualgp import WeightLayout, WeightPosterior, errors
from dualgp.transfer.curvature import kronecker_curvature
from dualgp.transfer.kronecker import KroneckerCurvature, KroneckerPosterior, KroneckerSite
from dualgp.transfer.merging import forget, merge
from dualgp.transfer.precisions import Dense, Eigen, Iterative, layer_precision

WAYS = {"eigenvectors": Eigen, "dense": Dense, "iterative": Iterative}


def network() -> nn.Sequential:
    """Two layers with factors, and a norm without."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 10, bias=False)).double()


def fitted(seeds: range, prior: Tensor | float) -> list[KroneckerPosterior]:
    net, found = network(), []
    layout = WeightLayout.of(net)
    S0 = torch.as_tensor(prior, dtype=F64)
    base = WeightPosterior(layout, prior_mean=layout.join(net.state_dict()), prior_precision=S0)
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        x, y = torch.randn(30, 5, generator=g, dtype=F64), torch.randint(10, (30,), generator=g)
        mean = base.mean + torch.randn(layout.size, generator=g, dtype=F64)
        B = kronecker_curvature(net, x, y, softmax_likelihood())
        found.append(KroneckerPosterior.fine_tuned(base, mean, B))
    return found


def of(way: str, monkeypatch: pytest.MonkeyPatch) -> KroneckerPosterior:
    """A posterior whose layers are worked on in this way."""
    if way == "iterative":
        monkeypatch.setattr("dualgp.transfer.precisions._DENSE", 1)
    q = fitted(range(1), 0.1)[0] if way == "eigenvectors" else merge(fitted(range(3), 0.1), (1.0, 0.5, 2.0))
    for _, where, terms in q.site.B.layers():
        assert type(layer_precision("", terms, q.prior_precision[where])) is WAYS[way]
    return q


@pytest.mark.parametrize("way", WAYS)
def test_variances_and_means_are_those_of_the_dense_posterior(way, monkeypatch):
    q = of(way, monkeypatch)
    dense = q.to_dense()
    assert gap(q.variance() / dense.variance(), torch.ones(q.layout.size)) < 1e-10
    assert gap(q.mean, dense.mean) < 1e-10


@pytest.mark.parametrize(("way", "count"), [("eigenvectors", 4000), ("dense", 4000), ("iterative", 150)])
def test_draws_have_the_covariance_of_the_dense_posterior(way, count, monkeypatch):
    """Whitened, the sample covariance C of N(0, I) has E|C − I|² = P(P + 1)/n, and n|mean|² is χ² of P."""
    q = of(way, monkeypatch)
    draws, P = q.sample(count, generator=torch.Generator().manual_seed(0)), q.layout.size
    root = torch.linalg.cholesky(q.to_dense().precision)
    z = (draws - q.mean) @ root
    expected = P * (P + 1) / count
    found = float((z.mT @ z / count - torch.eye(P, dtype=F64)).square().sum())
    assert abs(found / expected - 1) < 0.2  # its standard deviation is some 2/P
    assert abs(float(z.square().mean()) - 1) < 6 * math.sqrt(2 / (count * P))
    assert count * float(z.mean(0).square().sum()) < P + 6 * math.sqrt(2 * P)
    assert torch.equal(draws, q.sample(count, generator=torch.Generator().manual_seed(0)))


def test_the_prior_alone_is_drawn_from_too():
    layout = WeightLayout({"w": torch.Size([40])})
    q = KroneckerPosterior(layout, prior_mean=3.0, prior_precision=torch.full((40,), 4.0, dtype=F64))
    assert gap(q.variance(), torch.full((40,), 0.25)) == 0
    z = (q.sample(1000, generator=torch.Generator().manual_seed(0)) - 3.0) * 2.0
    assert abs(float(z.square().mean()) - 1) < 6 * math.sqrt(2 / 40_000)


def test_draws_go_through_the_network_and_leave_it_alone():
    q, net, x = fitted(range(1), 2.0)[0], network(), torch.randn(7, 5, dtype=F64)
    before = {n: p.clone() for n, p in net.state_dict().items()}
    found = q.predict_samples(net, x, 3, generator=torch.Generator().manual_seed(1))
    for theta, f in zip(q.sample(3, generator=torch.Generator().manual_seed(1)), found, strict=True):
        assert gap(f, torch.func.functional_call(net, q.layout.split(theta), (x,)).detach()) < 1e-13
    assert all(torch.equal(before[n], p) for n, p in net.state_dict().items())
    with pytest.raises(errors.InputError, match="num_samples"):
        q.sample(0)


def test_what_was_taken_out_is_multiplied_out_or_refused(monkeypatch):
    """A negative product has no root to draw by."""
    full = fitted(range(3), 2.0)
    left = forget(merge(full), full[2])
    truth = merge(full[:2])
    monkeypatch.setattr("dualgp.transfer.precisions._DENSE", 1)
    assert gap(left.variance() / truth.variance(), torch.ones(left.layout.size)) < 1e-9
    draws = left.sample(3000, generator=torch.Generator().manual_seed(0))
    assert gap(draws.var(0) / truth.variance(), torch.ones(left.layout.size)) < 6 * math.sqrt(2 / 3000)
    monkeypatch.setattr("dualgp.transfer.precisions._DENSE_VARIANCE", 1)
    with pytest.raises(errors.UnsupportedError, match="multiplied out for draws where something was taken out"):
        left.sample(1)
    with pytest.raises(errors.UnsupportedError, match="exact variances: draw samples"):
        left.variance()


def test_one_product_that_outweighs_its_prior_is_refused():
    layout = WeightLayout({"w": torch.Size([2, 2])})
    B = KroneckerCurvature(layout, {("w",): ((-torch.eye(2), torch.eye(2)),)}, torch.zeros(4))
    with pytest.raises(errors.NotPositiveDefiniteError, match="No Gaussian is left in layer"):
        KroneckerPosterior(layout, KroneckerSite(torch.ones(4), B), prior_precision=0.5)
