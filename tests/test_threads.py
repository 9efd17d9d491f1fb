"""Many threads that ask one model at once are each told what one alone is told, and leave torch and GPyTorch as set."""

import contextlib
import copy
import sys
import threading

import gpytorch
import pytest
import torch
from gpytorch.kernels import PeriodicKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood
from netproblems import NET, SOFTMAX, X, Y
from toys import F64, line, same_bits

from dualgp import DualGP, ExactGP, WeightLayout, WeightPosterior, network_gp
from dualgp.kernels import NetworkJacobian

THREADS = 8
AT = line(0, 6, 40)
_x = line(0, 6, 30)
_y = _x.sin()[:, 0]


def dual_gp(kernel=None) -> DualGP:
    gp = DualGP(kernel or ScaleKernel(RBFKernel()).double(), GaussianLikelihood().double(), num_inducing=8, memory=10)
    gp.update(_x, _y, learn_hyperparameters=False)
    return gp


def not_asked_yet() -> DualGP:
    gp = dual_gp()
    new = DualGP(ScaleKernel(RBFKernel()).double(), GaussianLikelihood().double(), num_inducing=8, memory=10)
    new.load_state_dict(gp.state_dict())
    return new


def set_by_hand() -> DualGP:
    """The first to ask reads the sites under the new hyperparameters, and writes them."""
    gp = dual_gp()
    gp.kernel.base_kernel.lengthscale = torch.tensor(0.9, dtype=F64)
    return gp


def exact_gp() -> ExactGP:
    gp = ExactGP(ScaleKernel(RBFKernel()).double(), BernoulliLikelihood(), rank=10, num_probes=2)
    gp.fit(_x, (_y > 0).double(), learn_hyperparameters=False)
    new = ExactGP(ScaleKernel(RBFKernel()).double(), BernoulliLikelihood(), rank=10, num_probes=2)
    new.load_state_dict(gp.state_dict())
    return new


def by_gpytorch() -> DualGP:
    """A kernel that dualgp has no products of its own for."""
    return dual_gp(PeriodicKernel().double() + RBFKernel().double())


def conditioned():
    return dual_gp().condition(AT[:3], AT[:3, 0])


MODELS = {
    "dual": dual_gp,
    "dual, loaded": not_asked_yet,
    "dual, set by hand": set_by_hand,
    "dual, kernel of GPyTorch": by_gpytorch,
    "exact, loaded": exact_gp,
    "conditioned": conditioned,
    "network": lambda: network_gp(NET, (X, Y), SOFTMAX),
    "network, sparse": lambda: network_gp(NET, (X, Y), SOFTMAX, num_inducing=8),
    "network, kronecker": lambda: network_gp(NET, (X, Y), SOFTMAX, structure="kronecker"),
}


@contextlib.contextmanager
def eager_switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def at_once(calls) -> list:
    """What each call returns, all begun at once in threads of their own; an error is a result."""
    found, gate = [None] * len(calls), threading.Barrier(len(calls))

    def run(i: int) -> None:
        gate.wait()
        try:
            found[i] = calls[i]()
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    with eager_switching():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found


MODES = (contextlib.nullcontext, torch.no_grad, torch.inference_mode)


def switches() -> list:
    backends = [torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv]
    return [gpytorch.settings.lazily_evaluate_kernels.on(), *(b.fp32_precision for b in backends)]


@pytest.mark.parametrize("kind", MODELS)
def test_threads_are_told_what_one_alone_is_told(kind):
    x = X if kind.startswith("network") else AT
    alone = [t.detach() for t in MODELS[kind]().predict(x)]
    q, before = MODELS[kind](), switches()

    def ask(i: int):
        with MODES[i % len(MODES)]():
            return [[t.detach().clone() for t in q.predict(x)] for _ in range(5)]

    for told in at_once([lambda i=i: ask(i) for i in range(THREADS)]):
        assert not isinstance(told, Exception), told
        assert all(same_bits(one, alone) for one in told)
    assert switches() == before
    if isinstance(q, DualGP):  # what was made under inference mode can be learned from
        q.update(_x[:5], _y[:5])


def test_networks_of_one_copy_give_each_thread_its_own_jacobian():
    jacobian = NetworkJacobian(NET, X)
    parts = X.split(5)
    alone = [jacobian.block(part).dense() for part in parts]
    for _ in range(3):
        for told, expected in zip(at_once([lambda p=p: jacobian.block(p).dense() for p in parts]), alone, strict=True):
            assert same_bits(told, expected)


def test_draws_of_weights_do_not_meet_in_the_network():
    net = copy.deepcopy(NET)
    layout = WeightLayout.of(net)
    prior = torch.zeros(layout.size, dtype=F64)
    q = WeightPosterior(layout, prior_mean=prior, prior_precision=prior + 1.0)
    before = copy.deepcopy(net.state_dict())

    def ask(seed: int):
        return q.predict_samples(net, X, 5, generator=torch.Generator().manual_seed(seed))

    alone = [ask(seed) for seed in range(THREADS)]
    for _ in range(3):
        assert same_bits(at_once([lambda s=s: ask(s) for s in range(THREADS)]), alone)
    assert same_bits(dict(net.state_dict()), dict(before))


def test_generators_of_their_own_give_each_thread_its_own_draws():
    gp = dual_gp()
    ask = lambda seed: gp.sample(AT, 3, generator=torch.Generator().manual_seed(seed)).detach()  # noqa: E731
    alone = [ask(seed) for seed in range(THREADS)]
    assert same_bits(at_once([lambda s=s: ask(s) for s in range(THREADS)]), alone)


def test_a_state_can_be_taken_while_a_model_is_asked():
    alone = set_by_hand()
    expected, gp = alone.predict(AT), set_by_hand()
    *told, state = at_once([*[lambda: gp.predict(AT)] * 4, gp.state_dict])
    assert all(same_bits(list(t), list(expected)) for t in told)
    assert same_bits(dict(state), dict(alone.state_dict()))
