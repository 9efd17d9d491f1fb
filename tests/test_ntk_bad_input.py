"""Networks and arguments that cannot be used are refused, with what to do."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import Wired, draw, make, mlp
from torch import nn
from toys import F64

from dualgp.errors import InputError, UnsupportedError
from dualgp.kernels import NetworkJacobian
from dualgp.kernels.networks import frozen_network


def linear(forward: Callable) -> nn.Module:
    return Wired(forward, a=nn.Linear(4, 2)).double()


def weights(value: float) -> nn.Module:
    net = mlp().double()
    net[2].weight.data[0, 0] = value
    return net


@pytest.mark.parametrize(
    ("net", "error", "match"),
    [
        (lambda: linear(lambda self, x: self.a(x)[:, None]), UnsupportedError, r"\[n, C\].*returned shape \(3, 1, 2\)"),
        (lambda: linear(lambda self, x: (self.a(x), x)), UnsupportedError, r"returned tuple.*Wrap it"),
        (lambda: linear(lambda self, x: self.a(x).sum()), UnsupportedError, r"returned shape \(\)"),
        (lambda: linear(lambda self, x: self.a(x).argmax(1)), UnsupportedError, r"returned torch.int64"),
        (lambda: linear(lambda self, x: self.a(x - x.mean(0))), UnsupportedError, "change with the other rows"),
        (lambda: linear(lambda self, x: F.dropout(self.a(x), 0.5)), UnsupportedError, "or from call to call"),
        (
            lambda: nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2, track_running_stats=False)).double().eval(),
            UnsupportedError,
            "Batch normalisation without running statistics",
        ),
        (lambda: linear(lambda self, x: self.a(x).detach()), UnsupportedError, "no derivative"),
        (lambda: linear(lambda self, x: x), UnsupportedError, "no derivative"),
        (lambda: linear(lambda self, x: self.a(x) / 0), InputError, "outputs hold NaN or infinity"),
        (lambda: weights(float("nan")), InputError, "2.weight holds NaN or infinity"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), UnsupportedError, "lazy layers"),
        (lambda: nn.Linear(4, 2, dtype=torch.complex128), UnsupportedError, "Complex parameters"),
        (lambda: nn.Linear(4, 2, device="meta"), UnsupportedError, "without values"),
        (nn.Tanh, InputError, "no parameters"),
    ],
)
def test_networks_that_will_not_do_are_refused(net, error, match):
    network = net()
    rng = torch.get_rng_state()
    with pytest.raises(error, match=match):
        NetworkJacobian(network, draw(3, 4))
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_function_is_no_network():
    with pytest.raises(UnsupportedError, match="Expected a torch.nn.Module, got builtin"):
        frozen_network(torch.tanh)


def test_an_in_place_operation_that_autograd_refuses_is_refused():
    def forward(self, x):
        h = self.a(x)
        z = self.b(h)
        h.mul_(0.5)
        return z + h

    net = Wired(forward, a=nn.Linear(4, 2), b=nn.Linear(2, 2)).double()
    with pytest.raises(UnsupportedError, match="autograd.*in-?place"):
        NetworkJacobian(net, draw(3, 4))


def test_derivatives_that_are_not_finite_are_refused():
    net = nn.Sequential(nn.Linear(4, 2, bias=False), Wired(lambda self, x: x.abs().sqrt())).double()
    with pytest.raises(InputError, match=r"Jacobian of \['0.weight'\] hold NaN or infinity"):
        NetworkJacobian(net, draw(3, 4)).block(torch.zeros(2, 4, dtype=F64))


def test_bad_arguments_are_refused():
    net, x = make("tanh")
    jacobian = NetworkJacobian(net, x)
    with pytest.raises(InputError, match=r"params must be 'all'.*got 'everything'"):
        NetworkJacobian(net, x, params="everything")
    with pytest.raises(InputError, match=r"No parameters are named \['5'\]"):
        NetworkJacobian(net, x, params=["0", "5"])
    with pytest.raises(InputError, match="selects no parameters"):
        NetworkJacobian(net, x, params=lambda name: "lora" in name)
    with pytest.raises(InputError, match="two rows"):
        NetworkJacobian(net, x[:1])
    with pytest.raises(InputError, match=r"takes [\d,]+ bytes, more than the budget of 100"):
        NetworkJacobian(net, x, budget=100)
    with pytest.raises(InputError, match=r"Expected x of shape \[n, 4\], got \(6, 3\)"):
        jacobian(x[:, :3])
    with pytest.raises(InputError, match="no rows"):
        jacobian.block(x[:0])
    with pytest.raises(InputError, match="Expected 6 finite scales"):
        jacobian.scaled(torch.ones(5, dtype=F64))
    with pytest.raises(InputError, match="different networks or parameters"):
        jacobian.block(x).gram(NetworkJacobian(net, x, params="last_layer").block(x))


def test_no_rows_give_no_outputs():
    net, x = make("tanh")
    jacobian = NetworkJacobian(net, x)
    assert jacobian(x[:0]).shape == (0, 3)
    assert list(jacobian.blocks(x[:0])) == []
    assert jacobian.jvp(x[:0], jacobian.theta).shape == (0, 3)
    assert not jacobian.vjp(x[:0], draw(0, 3)).any()


def test_old_weight_norm_is_refused_with_its_remedy():
    with pytest.warns(FutureWarning, match="weight_norm"):
        net = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 2)))
    net(draw(3, 4).float())
    with pytest.raises(UnsupportedError, match="weight_norm is a common cause"):
        NetworkJacobian(net, draw(3, 4))


def test_a_torchscript_module_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.script(nn.Linear(4, 2))
    with pytest.raises(UnsupportedError, match="TorchScript.*module itself"):
        NetworkJacobian(script, draw(3, 4))
