"""What is found on a GPU is what is found on a CPU; on a machine without one, the same runs once more on the CPU."""

import copy

import pytest
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood, SoftmaxLikelihood
from torch import nn
from toys import F64, gap, waves

from dualgp import DualGP, ExactGP, WeightLayout, WeightPosterior, leverage, network_gp
from dualgp.errors import InputError


def problem(name: str):
    x, f, g = waves(120, 2)
    if name == "gaussian":
        return x, f + 0.2 * torch.randn(120, generator=g, dtype=F64), GaussianLikelihood().double(), None
    if name == "bernoulli":
        return x, (f > 0).double(), BernoulliLikelihood(), None
    likelihood = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    return x, (x[:, 0] * 3).floor().long().clamp(0, 2), likelihood, 3


def kernel():
    return ScaleKernel(MaternKernel(ard_num_dims=2)).double()


def test_data_elsewhere_than_the_kernel_are_refused_by_name():
    x, y, likelihood, _ = problem("gaussian")
    for gp in (DualGP(kernel().to("meta"), likelihood, num_inducing=8), ExactGP(kernel().to("meta"), likelihood)):
        with pytest.raises(InputError, match=r"X is on cpu and ScaleKernel's \S+ on meta; move one"):
            gp.fit(x, y)
    gp = DualGP(kernel().to("meta"), likelihood, num_inducing=8)
    with pytest.raises(InputError, match=r"X is on cpu and ScaleKernel's \S+ on meta; move one"):
        gp.update(x, y)
    assert gp.inducing_points is None


def test_a_generator_of_the_cpu_draws_the_same_for_every_device(device):
    def drawn(place: torch.device) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        layout = WeightLayout.of(nn.Linear(3, 1))
        weights = WeightPosterior(layout, prior_mean=torch.zeros(4, device=place), prior_precision=2.0)
        x, y, likelihood, _ = problem("gaussian")
        gp = DualGP(kernel(), likelihood, num_inducing=8).to(place)
        gp.update(x.to(place), y.to(place), learn_hyperparameters=False)
        return [weights.sample(3, generator=g).cpu(), gp.posterior.sample(x[:5].to(place), 3, generator=g).cpu()]

    here, there = drawn(torch.device("cpu")), drawn(device)
    assert gap(here[0], there[0]) < 1e-6
    assert gap(here[1], there[1]) < 1e-6


@pytest.mark.filterwarnings("ignore::dualgp.errors.ConvergenceWarning")
@pytest.mark.parametrize("name", ["gaussian", "bernoulli", "softmax"])
def test_a_fit(name, device):
    x, y, likelihood, outputs = problem(name)
    found = []
    for place in (torch.device("cpu"), device):
        gp = DualGP(kernel(), copy.deepcopy(likelihood), num_inducing=8, num_outputs=outputs).to(place)
        gp.fit(x.to(place), y.to(place), max_rounds=2)
        found.append([t.detach().cpu() for t in gp.predict(x.to(place))])
        assert gp.posterior.site.B.device.type == place.type
    assert gap(found[0][0], found[1][0]) < 1e-3
    assert gap(found[0][1], found[1][1]) < 1e-3


@pytest.mark.parametrize("name", ["gaussian", "bernoulli", "softmax"])
def test_a_stream(name, device, tmp_path):
    x, y, likelihood, outputs = problem(name)
    found = []
    for place in (torch.device("cpu"), device):
        gp = DualGP(kernel(), copy.deepcopy(likelihood), num_inducing=12, num_outputs=outputs, memory=20).to(place)
        for rows in torch.arange(120).split(30):
            gp.update(x[rows].to(place), y[rows].to(place))
        gp.forget(gp.memory.ids[:3])
        gp.fade(0.9)
        gp.save(tmp_path / "gp.safetensors")
        gp = DualGP.load(tmp_path / "gp.safetensors", kernel(), copy.deepcopy(likelihood)).to(place)
        gp.update(x[:10].to(place), y[:10].to(place))
        given = gp.condition(x[50:53].to(place), y[50:53].to(place))
        found.append([t.detach().cpu() for t in (*gp.predict(x.to(place)), *given.predict(x[:9].to(place)))])
    assert all(gap(a, b) < 1e-3 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("how", ["dense", "kronecker", "diagonal", "sparse", "independent"])
def test_a_network(how, device):
    x, y, likelihood, _ = problem("softmax")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    options = {"structure": how}
    if how in ("sparse", "independent"):
        options = {"num_inducing": 10, "outputs": "coupled" if how == "sparse" else how}
    found = []
    for place in (torch.device("cpu"), device):
        q = network_gp(copy.deepcopy(net).to(place), (x[:100].to(place), y[:100].to(place)), likelihood, **options)
        q = q.tuned("evidence").condition(x[100:].to(place), y[100:].to(place), grow=0)
        values = [*q.predict(x.to(place)), q.log_predictive(x.to(place), y.to(place))]
        if how == "sparse":
            sites = q.sites_at(x.to(place), y.to(place))
            values += [leverage(q, x.to(place), sites), q.leave_one_out(x.to(place), y.to(place)).log_predictive]
        found.append([t.detach().cpu() for t in values])
    assert all(gap(a, b) < 1e-6 for a, b in zip(*found, strict=True))
