"""laplace-torch, where it is installed, as an oracle: its numbers from its curvature, and from our own."""

import pytest
import torch
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood, SoftmaxLikelihood
from jacobians import mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import F64

from dualgp import errors, network_gp
from dualgp.interop.laplace import from_laplace, to_laplace
from dualgp.nets import Structure

laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of theirs

X = torch.randn(40, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
CLASSES, VALUES = torch.arange(40) % 3, torch.stack([X[:, 0], X.sum(1), X[:, 1].square()], 1)
T = torch.linspace(-2, 2, 10, dtype=F64).view(5, 2)
TAU = 0.7
OURS = {"full": "dense", "kron": Structure(separate_bias=True), "diag": "diagonal"}


def conv() -> nn.Module:
    torch.manual_seed(2)
    layers = nn.Unflatten(1, (1, 1, 2)), nn.Conv2d(1, 4, (1, 2), padding=(0, 1)), nn.Tanh(), nn.Flatten()
    layers += (nn.Linear(12, 3),)
    return nn.Sequential(*layers).to(F64)


def fitted(structure: str, kind: str = "classification", subset: str = "all", net: nn.Module | None = None, **options):
    y = CLASSES if kind == "classification" else VALUES
    options = {"prior_precision": TAU, **options}
    la = laplace.Laplace(net or mlp(), kind, subset_of_weights=subset, hessian_structure=structure, **options)
    la.fit(DataLoader(TensorDataset(X, y), batch_size=11))
    return la, y


@pytest.fixture(autouse=True)
def _double():
    """Full curvature is multiplied by an identity of torch's default dtype in laplace-torch."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_same(q, la):
    """Mean, covariance and evidence."""
    mean, cov = q.predict_blocks(T)
    f, V = la._glm_predictive_distribution(T)
    torch.testing.assert_close(mean, f, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(cov, V, rtol=1e-8, atol=1e-9)
    assert abs(q.log_marginal_likelihood() - float(la.log_marginal_likelihood())) < 1e-8


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("structure", OURS)
def test_their_posterior_has_the_same_numbers_here_and_when_we_compute_it(structure, kind, subset):
    options = {"sigma_noise": 0.3, "temperature": 1.0} if kind == "regression" else {}
    la, y = fitted(structure, kind, subset, **options)
    assert_same(from_laplace(la, (X, y)), la)
    likelihood = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    if kind == "regression":
        likelihood = GaussianLikelihood().double()
        likelihood.noise = 0.09
    params = "all" if subset == "all" else "last_layer"
    own = network_gp(mlp(), (X, y), likelihood, prior_precision=TAU, structure=OURS[structure], params=params)
    assert_same(own, la)
    assert_same(own, to_laplace(own))


@pytest.mark.parametrize("structure", OURS)
def test_convolutions_and_a_prior_precision_for_each_tensor(structure):
    tau = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=F64)
    la, y = fitted(structure, net=conv(), prior_precision=tau)
    likelihood = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    own = network_gp(conv(), (X, y), likelihood, prior_precision=tau, structure=OURS[structure])
    for q in (from_laplace(la, (X, y)), own):
        assert_same(q, la)
    assert_same(own, to_laplace(own))


@pytest.mark.parametrize("structure", OURS)
def test_there_and_back_at_another_prior_precision(structure):
    la, y = fitted(structure)
    q = from_laplace(la, (X, y))
    la.prior_precision = 5.0
    moved = q.with_prior_precision(5.0)
    assert_same(moved, la)
    again = from_laplace(to_laplace(moved), (X, y))
    torch.testing.assert_close(again.predict(T)[1], moved.predict(T)[1], rtol=1e-10, atol=1e-11)
    assert abs(q.log_marginal_likelihood(5.0) - float(la.log_marginal_likelihood())) < 1e-8


def test_the_temperature_stays_in_the_curvature():
    la, y = fitted("diag", temperature=3.0)
    mean, cov = from_laplace(la, (X, y)).predict_blocks(T)
    torch.testing.assert_close(cov, la._glm_predictive_distribution(T)[1], rtol=1e-8, atol=1e-9)


def test_data_can_be_forgotten_and_the_network_is_reported_on():
    la, y = fitted("full")
    q = from_laplace(la, DataLoader(TensorDataset(X, y), batch_size=7))
    likelihood = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    own = network_gp(mlp(), (X, y), likelihood, prior_precision=TAU, structure="dense")
    assert q.stationarity == own.stationarity or abs(q.stationarity.residual - own.stationarity.residual) < 1e-9
    left, own_left = q.forget(X[:9], y[:9]), own.forget(X[:9], y[:9])
    torch.testing.assert_close(left.predict(T)[1], own_left.predict(T)[1], rtol=1e-8, atol=1e-9)
    with pytest.raises(errors.InputError, match="not in the posterior"):
        left.forget(X[:1], y[:1])


def test_what_has_no_counterpart_says_so():
    la, y = fitted("diag")
    with pytest.raises(errors.InputError, match="fitted to 40 data, but 39"):
        from_laplace(la, (X[:39], y[:39]))
    with pytest.raises(errors.UnsupportedError, match="prior mean"):
        from_laplace(fitted("diag", prior_mean=0.5)[0], (X, y))
    with pytest.raises(errors.UnsupportedError, match="each parameter"):
        from_laplace(fitted("diag", prior_precision=torch.linspace(1, 2, 27, dtype=F64))[0], (X, y))
    with pytest.raises(errors.UnsupportedError, match="damping"):
        from_laplace(fitted("kron", damping=True)[0], (X, y))
    with pytest.raises(errors.UnsupportedError, match="no counterpart"):
        from_laplace(laplace.FunctionalLaplace(mlp(), "classification", n_subset=5), (X, y))
    with pytest.raises(errors.InputError, match="not fitted"):
        from_laplace(laplace.DiagLaplace(mlp(), "classification"), (X, y))
    with torch.no_grad():
        la.model[0].weight.add_(1.0)
    with pytest.raises(errors.InputError, match="fit it again"):
        from_laplace(la, (X, y))
    softmax = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    for options, message in [
        ({"structure": "kronecker"}, "separate_bias=True"),
        ({"num_inducing": 3}, "function space"),
        ({"centre": "map", "structure": "dense"}, "mean"),
    ]:
        with pytest.raises(errors.UnsupportedError, match=message):
            to_laplace(network_gp(mlp(), (X, y), softmax, **options))
    with pytest.raises(errors.UnsupportedError, match="BernoulliLikelihood"):
        to_laplace(network_gp(mlp(outputs=1), (X, y.clamp(max=1)), BernoulliLikelihood(), structure="dense"))
