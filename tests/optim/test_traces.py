"""Hand-worked steps of every rule on ½a(θ − b)², a = 2, b = 1, from m = ½ with given noise."""

from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import Any

import pytest
import torch
from torch import nn
from toys import F64

from dualgp.errors import NumericalWarning
from dualgp.optim import BSAM, IVON, VOGN, AdditiveBLR, AffineBLR, MultiplicativeBLR, SampledOptimizer

Z = (1.0, -0.5, 0.25, -2.0)
IVON_SETTINGS: dict[str, Any] = {"lr": 0.1, "ess": 10, "weight_decay": 0.1, "hess_init": 1.0, "beta2": 0.99}


def start(rule: Callable[..., SampledOptimizer], **settings: Any) -> tuple[nn.Parameter, SampledOptimizer]:
    p = nn.Parameter(torch.tensor([0.5], dtype=F64))
    optimizer = rule([("w", p)], **settings)
    noise: Iterator[float] = iter(Z)
    optimizer._noise = lambda out: out.fill_(next(noise))  # type: ignore[method-assign]
    return p, optimizer


def loss(p: nn.Parameter) -> torch.Tensor:
    return (p - 1.0).square().sum()


def assert_near(found: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.tensor(found, dtype=F64), torch.tensor(expected, dtype=F64), rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore::dualgp.errors.NumericalWarning")  # the noise is wide, on purpose
class TestIVON:
    def test_every_number_of_four_steps(self):
        p, optimizer = start(IVON, **IVON_SETTINGS)
        rows = []
        for _ in range(4):
            with optimizer.sampled_params():
                theta = p.item()
                loss(p).backward()
                g = p.grad.item()
            optimizer.step()
            state = optimizer.state[p]
            rows.append([theta, g, state["momentum"].item(), state["hess"].item(), p.item()])
        expected = [
            [0.8015113446, -0.3969773108, -0.0396977311, 0.9770776953, 0.5354361662],
            [0.3830847526, -1.2338304948, -0.1591110075, 0.9876043180, 0.6147178496],
            [0.6905240182, -0.6189519636, -0.2050951031, 0.9727283450, 0.6860192549],
            [0.0753794402, -1.8492411195, -0.3695097047, 1.0899207824, 0.7790047047],
        ]
        assert_near(rows, expected)
        assert_near(optimizer.posterior().variance().sqrt().item(), 0.2898951671)
        assert_near(optimizer.posterior().mean.item(), p.item())

    @pytest.mark.parametrize(
        ("settings", "hess", "mean"),
        [
            ({"rescale_lr": False}, 1.0921174156, 0.7562735890),
            ({"debias": False}, 1.1122739179, 0.5631361814),
            ({"clip_radius": 0.5}, 1.0954053594, 0.7004361662),
            ({"hess_approx": "gradsq", "batch_size": 10}, 1.5323087598, 0.7308352323),
        ],
    )
    def test_variants(self, settings, hess, mean):
        p, optimizer = start(IVON, **IVON_SETTINGS, **settings)
        for _ in range(4):
            optimizer.step(closure(p))
        assert_near([optimizer.state[p]["hess"].item(), p.item()], [hess, mean])

    @pytest.mark.parametrize("by_closure", [True, False])
    def test_two_draws_a_step(self, by_closure):
        p, optimizer = start(IVON, **IVON_SETTINGS, mc_samples=2)
        rows = []
        for _ in range(2):
            if by_closure:
                optimizer.step(closure(p))
            else:
                for _ in range(2):
                    with optimizer.sampled_params():
                        loss(p).backward()
                optimizer.step()
            rows.append([optimizer.state[p]["hess"].item(), p.item()])
        assert_near(rows, [[0.9942236845, 0.5803463472], [1.0505805447, 0.6821090174]])


def closure(p: nn.Parameter, decay: float = 0.0) -> Callable[[], torch.Tensor]:
    def evaluate() -> torch.Tensor:
        value = loss(p) + 0.5 * decay * p.square().sum()
        value.backward()
        return value

    return evaluate


def test_bsam():
    p, optimizer = start(BSAM, lr=0.1, num_data=10, prior_precision=1.0, sam_radius=0.05, damping=0.1, beta2=0.99)
    rows = []
    for _ in range(4):
        optimizer.step(closure(p))
        rows.append([optimizer.state[p]["momentum"].item(), p.item(), optimizer.state[p]["precision"].item()])
    expected = [
        [-0.0986754447, 0.5098675445, 0.9956754447],
        [-0.1947638435, 0.5294285213, 1.0006623980],
        [-0.2719331001, 0.5566038305, 1.0004891813],
        [-0.3493564080, 0.5915223898, 1.0140034923],
    ]
    assert_near(rows, expected)


def test_additive():
    p, optimizer = start(AdditiveBLR, lr=0.1, num_data=10, prior_precision=1.0, noise_std=0.3, beta1=0.9)
    rows = []
    for _ in range(4):
        optimizer.step(closure(p))
        rows.append(p.item())
    assert_near(rows, [0.5032, 0.5186628, 0.5401124012, 0.5806746819])


def test_affine():
    p, optimizer = start(
        AffineBLR, lr=0.5, lr_scale=0.2, num_data=10, prior_precision=1.0, scale_init=0.3, beta1=0.8, beta2=0.9
    )
    rows = []
    for _ in range(4):
        optimizer.step(closure(p))
        state = optimizer.state[p]
        rows.append([state["mu"].item(), state["mv"].item(), p.item(), state["scale"].item()])
    assert_near(rows[0], [-0.0196, -0.0192, 0.5028941582, 0.3011783080])
    assert_near(rows[3], [0.0992071840, -0.2252940379, 0.5679870111, 0.2971670556])


def test_multiplicative():
    p, optimizer = start(MultiplicativeBLR, lr=0.5, num_data=10, prior_precision=1.0, beta1=0.9, offset=1e-3)
    state = optimizer.state[p]
    state["plus"].fill_(0.501)  # |½| + 10⁻³
    state["minus"].fill_(0.201)  # |−.2| + 10⁻³
    draws = chain((1.2, 0.8, 0.6, 1.5, 2.0, 0.9, 0.7, 0.4), repeat(1.0))
    optimizer._rayleigh = lambda out: out.fill_(next(draws))  # type: ignore[method-assign]
    rows = []
    for _ in range(4):
        optimizer.step(closure(p))
        rows.append([state["plus"].item(), state["minus"].item()])
    assert_near(rows[0], [0.5200502340, 0.2002688315])
    assert_near(rows[3], [0.6560102219, 0.1873662807])


def test_vogn():
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(net.weight, 0.5)
    optimizer = VOGN(
        net, lambda f, y: 0.5 * (f - y).square().sum(), lr=0.1, num_data=10, prior_precision=1.0, beta2=0.9
    )
    noise = iter(Z)
    optimizer._noise = lambda out: out.fill_(next(noise))  # type: ignore[method-assign]
    rows = []
    for _ in range(4):
        optimizer.step(torch.tensor([[1.0], [2.0]], dtype=F64), torch.tensor([[1.0], [3.0]], dtype=F64))
        rows.append([optimizer.state[net.weight]["log_std"].item(), net.weight.item()])
    assert_near(rows[0], [-0.1256610643, 0.5140943058])
    assert_near(rows[3], [-0.6707070264, 0.5973299592])
    assert_near(optimizer.posterior().variance().sqrt().item(), 0.1617020923)


def test_wide_noise_is_warned_of():
    with pytest.warns(NumericalWarning, match="init_std"):
        start(IVON, **IVON_SETTINGS)
