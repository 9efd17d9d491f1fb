"""EVON: with axes that are given it is IVON; left to itself it finds the covariance between weights."""

import copy
import math

import pytest
import torch
from torch import nn
from toys import F64, gap

from dualgp import errors
from dualgp.optim import EVON, IVON

X = torch.tensor([[1.0, x] for x in range(-1, 5)], dtype=F64)
Y = torch.tensor([0.1, 0.9, 2.2, 2.8, 4.1, 5.2], dtype=F64).unsqueeze(-1)
PRECISION = torch.tensor([[25.0, 36.0], [36.0, 125.0]], dtype=F64)  # XᵀX/¼ + 1
MEAN = torch.tensor([0.970366, 1.026135], dtype=F64)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def backward(net, x, y):
    nn.functional.mse_loss(net(x), y).backward()


def test_without_turning_it_is_ivon():
    x, y = torch.randn(12, 3, dtype=F64), torch.randn(12, 2, dtype=F64)
    nets = network(), network()
    settings = {"lr": 0.2, "num_data": 100, "total_steps": 50}
    optimizers = [
        EVON(nets[0].named_parameters(), max_side=1, **settings),
        IVON(nets[1].named_parameters(), **settings),
    ]
    for _ in range(20):
        for net, optimizer in zip(nets, optimizers, strict=True):
            with optimizer.sampled_params():
                backward(net, x, y)
            optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert gap(a.detach(), b.detach()) < 1e-12
    q = [optimizer.posterior() for optimizer in optimizers]
    assert gap(q[0].precision, torch.diag(q[1].precision)) < 1e-9


def reference_step(M, mom, h, QL, QR, L, R, G, E, t, lam, d, rho, gamma, lr, h0):
    """One step in plain formulas; returns what moves, Q still that of the draw."""
    turned = QL.T @ G @ QR
    hhat = lam * (h + d) * turned * (QL.T @ E @ QR)
    h = h + rho * (hhat - h) + 0.5 * rho**2 * (hhat - h) ** 2 / (h + d)
    mom = 0.9 * mom + 0.1 * G
    step = QL @ ((QL.T @ (mom / (1 - 0.9**t) + d * M) @ QR) / (h + d)) @ QR.T
    return M - lr * (h0 + d) * step, mom, h, gamma * L + (1 - gamma) * G @ G.T, gamma * R + (1 - gamma) * G.T @ G


def test_steps_are_the_formulas():
    W = nn.Parameter(torch.randn(3, 2, dtype=F64))
    A, B = torch.randn(3, 3, dtype=F64), torch.randn(2, 2, dtype=F64)
    lam, d, h0, rho, gamma, lr = 50.0, 0.1, 2.0, 0.05, 0.9, 0.3
    optimizer = EVON(
        [("w", W)], lr, ess=lam, weight_decay=d, hess_init=h0, beta2=1 - rho, basis_beta=gamma, basis_every=2
    )
    M, mom, h = W.detach().clone(), torch.zeros(3, 2, dtype=F64), torch.full((3, 2), h0, dtype=F64)
    QL, QR, L, R = torch.eye(3, dtype=F64), torch.eye(2, dtype=F64), torch.zeros(3, 3, dtype=F64), torch.zeros(2, 2)
    R = R.double()
    for t in range(1, 6):
        with optimizer.sampled_params():
            E = W.detach() - M
            (0.5 * (A @ W @ B).square().sum()).backward()
            G = W.grad.clone()
        z = QL.T @ E @ QR * (lam * (h + d)).sqrt()
        assert 0.1 < z.square().mean().sqrt() < 3.0  # the draw has the scale that q says
        M, mom, h, L, R = reference_step(M, mom, h, QL, QR, L, R, G, E, t, lam, d, rho, gamma, lr, h0)
        optimizer.step()
        if t == 1:
            QL, QR = torch.linalg.eigh(L)[1].flip(-1), torch.linalg.eigh(R)[1].flip(-1)
        elif t % 2 == 0:
            QL, QR = torch.linalg.qr(L @ QL)[0], torch.linalg.qr(R @ QR)[0]
        assert gap(W.detach(), M) < 1e-9
        assert gap(optimizer.state[W]["hess"], h) < 1e-9
        assert gap(optimizer.state[W]["q_left"], QL) < 1e-7
    dense, diagonal = optimizer.posterior(), optimizer.posterior(structure="diagonal")
    Q = torch.kron(QL, QR)
    assert gap(dense.precision, Q @ torch.diag(lam * (h + d).flatten()) @ Q.T) < 1e-6
    assert gap(dense.variance(), diagonal.variance()) < 1e-9
    assert gap(dense.mean, M.flatten()) < 1e-9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dualgp.errors.NumericalWarning")  # the noise is wide, on purpose
def test_the_covariance_of_a_regression_is_found():
    """Exact posterior: correlation −.644, standard deviations (.2614, .1169); a diagonal one has (.2, .0894)."""
    net = nn.Linear(2, 1, bias=False).double()
    optimizer = EVON(net.named_parameters(), lr=0.1, ess=6, weight_decay=1 / 6, hess_init=1.0, beta2=0.999)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 15_000)
    for _ in range(15_000):
        with optimizer.sampled_params():
            ((Y - net(X)).square().mean() / 0.5).backward()
        optimizer.step()
        schedule.step()
    q = optimizer.posterior()
    cov = torch.linalg.inv(q.precision)
    sd = cov.diagonal().sqrt()
    exact = torch.linalg.inv(PRECISION)
    assert gap(q.mean, MEAN) < 0.01
    assert abs(float(cov[0, 1] / sd.prod()) + 0.644) < 0.03
    assert gap(sd / exact.diagonal().sqrt(), torch.ones(2, dtype=F64)) < 0.05


def test_a_run_goes_on_to_the_last_bit():
    x, y = torch.randn(12, 3, dtype=F64), torch.randn(12, 2, dtype=F64)

    def build(net):
        return EVON(net.named_parameters(), 0.2, num_data=100, total_steps=50, basis_every=2)

    def train(net, optimizer, steps):
        for _ in range(steps):
            with optimizer.sampled_params():
                backward(net, x, y)
            optimizer.step()

    whole, part = network(), network()
    first, second = build(whole), build(part)
    train(whole, first, 10)
    train(part, second, 5)
    state, weights = copy.deepcopy(second.state_dict()), copy.deepcopy(part.state_dict())
    net = network()
    again = build(net)
    net.load_state_dict(weights)
    again.load_state_dict(state)
    train(net, again, 5)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), net.parameters(), strict=True))


def test_bad_settings():
    net = nn.Linear(70, 70)
    for options, message in (
        ({"basis_beta": 1.0}, "basis_beta"),
        ({"basis_every": 0}, "basis_every"),
        ({"clip_radius": 0.0}, "clip_radius"),
        ({"lr": math.nan}, "lr must"),
    ):
        with pytest.raises(errors.InputError, match=message):
            EVON(net.parameters(), **{"num_data": 10, "total_steps": 10, **options})
    with pytest.raises(errors.InputError, match="positive and finite"):
        EVON(net.parameters(), ess=math.inf, hess_init=1.0, beta2=0.9)
    optimizer = EVON(net.named_parameters(), num_data=10, total_steps=10)
    with pytest.raises(errors.UnsupportedError, match="structure="):
        optimizer.posterior()
    assert optimizer.posterior(structure="diagonal").structure == "diagonal"
