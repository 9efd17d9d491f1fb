"""Public calls with arguments that are right, ways to spoil an argument, and the law that holds whatever comes in."""

import copy
import functools
import linecache
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood, SoftmaxLikelihood
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributions import Categorical
from toys import F64, same_bits, unchecked

import dualgp
from dualgp import (
    DualGP,
    ExactGP,
    InducingBasis,
    JacobianBasis,
    LazyKernel,
    Posterior,
    Sites,
    WeightLayout,
    WeightPosterior,
    WeightSite,
    active,
    errors,
    network_gp,
    optim,
    plotting,
    transfer,
)
from dualgp.kernels import NetworkJacobian

ROOT = str(Path(dualgp.__file__).parent)
NAN, INF = float("nan"), float("inf")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


X = torch.rand(12, 2, generator=seeded(1), dtype=F64)
Y = (5 * X).sin().sum(-1)
LABELS = (Y.median() < Y).double()
CLASSES = torch.arange(12) % 3
AT = torch.rand(5, 2, generator=seeded(2), dtype=F64)
SOFTMAX = SoftmaxLikelihood(num_classes=3, mixing_weights=False)


# --- what is asked ----------------------------------------------------------------------------------


def kernel() -> ScaleKernel:
    return ScaleKernel(RBFKernel()).double()


@functools.cache
def _gp(kind: str) -> DualGP:
    torch.manual_seed(0)
    labels = kind == "labels"
    options: dict[str, Any] = {"window": 8} if kind == "window" else {"memory": 6}
    gp = DualGP(kernel(), BernoulliLikelihood() if labels else GaussianLikelihood().double(), num_inducing=5, **options)
    gp.update(X, LABELS if labels else Y, learn_hyperparameters=False)
    return gp


def gp(kind: str = "regression") -> DualGP:
    return copy.deepcopy(_gp(kind))


@functools.cache
def line_gp() -> DualGP:
    made = DualGP(kernel(), GaussianLikelihood().double(), num_inducing=4, memory=3)
    made.update(X[:, :1], Y, learn_hyperparameters=False)
    return made


def labels_gp() -> DualGP:
    return gp("labels")


def window_gp() -> DualGP:
    return gp("window")


def new_gp() -> DualGP:
    return DualGP(kernel(), GaussianLikelihood().double(), num_inducing=5)


@functools.cache
def _exact() -> ExactGP:
    made = ExactGP(kernel(), GaussianLikelihood().double(), rank=6, num_probes=2)
    made.fit(X, Y, learn_hyperparameters=False)
    return made


def exact() -> ExactGP:
    return copy.deepcopy(_exact())


@functools.cache
def net() -> nn.Module:
    made = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel(), dtype=F64).view_as(p))
    return made


@functools.cache
def network():
    return network_gp(net(), (X, CLASSES), SOFTMAX)


@functools.cache
def sparse_network():
    return network_gp(net(), (X, CLASSES), SOFTMAX, num_inducing=4)


@functools.cache
def kronecker_network():
    return network_gp(net(), (X, CLASSES), SOFTMAX, structure="kronecker")


@functools.cache
def basis() -> InducingBasis:
    return InducingBasis(kernel(), X[:4])


@functools.cache
def sites() -> Sites:
    return Sites(Y.clone(), torch.ones(12, dtype=F64))


@functools.cache
def posterior() -> Posterior:
    return Posterior(basis()).add(X, sites())


@functools.cache
def conditioned():
    return _gp("regression").condition(AT, AT[:, 0])


@functools.cache
def jacobian() -> NetworkJacobian:
    return NetworkJacobian(net(), X)


@functools.cache
def jacobian_basis() -> JacobianBasis:
    return JacobianBasis.at_inputs(jacobian(), X[:4], 1.0)


@functools.cache
def layout() -> WeightLayout:
    return WeightLayout.of(net())


def _mean() -> Tensor:
    return torch.linspace(-1, 1, layout().size, dtype=F64)


@functools.cache
def weights() -> WeightPosterior:
    one = torch.ones(layout().size, dtype=F64)
    site = WeightSite(0.3 * _mean(), 2 * one)
    return WeightPosterior(layout(), site, prior_mean=0 * one, prior_precision=one)


@functools.cache
def server() -> transfer.FederatedServer:
    return transfer.FederatedServer.start(weights().as_prior(), ["a", "b"], rho=0.5)


@functools.cache
def memory() -> transfer.MemorySet:
    return transfer.MemorySet.of(net(), X, CLASSES)


def pool() -> active.PoolLoop:
    return active.PoolLoop(gp(), AT, "variance")


@functools.cache
def left_out():
    q = _gp("regression")
    return dualgp.leave_one_out(q, X, Y, q.sites_at(X, Y), q.likelihood)


def regression_sites() -> Sites:
    return _gp("regression").sites_at(X, Y)


def coupled_sites() -> Sites:
    return network().sites_at(X, CLASSES)


def ivon() -> optim.IVON:
    return optim.IVON(copy.deepcopy(net()).parameters(), num_data=12, prior_precision=1.0)


def axes() -> Axes:
    return Figure().subplots()


def parameters() -> list[nn.Parameter]:
    return list(copy.deepcopy(net()).parameters())


def vogn(**options: Any) -> optim.VOGN:
    rates = {"num_data": 12, "prior_precision": 1.0} | options
    return optim.VOGN(copy.deepcopy(net()), nn.functional.cross_entropy, **rates)


def shards(**options: Any) -> Any:
    """Merge two models of one file each."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{name}.safetensors" for name in ("base", "a", "b")]
        for k, path in enumerate(paths):
            save_file({"w": X + k}, path)
        out = f"{folder}/out.safetensors"
        transfer.merge_shards(paths[0], paths[1:], out, **options)
        return load_file(out)["w"]


class Call(NamedTuple):
    """A public call: whom it asks, with what, and how."""

    of: Callable[[], Any]
    how: Callable[..., Any]
    given: dict[str, Any]


def method(of: Callable[[], Any], name: str, /, **given: Any) -> Call:
    return Call(of, lambda subject, **kwargs: getattr(subject, name)(**kwargs), given)


def function(f: Callable[..., Any], /, **given: Any) -> Call:
    return Call(lambda: None, lambda _, **kwargs: f(**kwargs), given)


def plot(f: Callable[..., Any], /, *args: Any, **given: Any) -> Call:
    return Call(axes, lambda ax, **kwargs: f(ax, *args, **kwargs), given)


LIK = GaussianLikelihood().double()
QUIET = {"progress": False}


def _calls() -> dict[str, Call]:
    calls: dict[str, Call] = {}
    for kind, of, y in (("", gp, Y), (" labels", labels_gp, LABELS)):
        calls |= {
            f"update{kind}": method(of, "update", X=X, y=y, weights=torch.ones(12, dtype=F64), tol=1e-4),
            f"condition{kind}": method(of, "condition", X=AT, y=y[:5]),
            f"elbo{kind}": method(of, "elbo", x=X, y=y),
            f"nlpd{kind}": method(of, "nlpd", x=X, y=y),
            f"log_predictive{kind}": method(of, "log_predictive", x=X, y=y),
            f"sites_at{kind}": method(of, "sites_at", x=X, y=y),
            f"predict_likelihood{kind}": method(of, "predict_likelihood", x=AT),
        }
    calls |= {
        "DualGP.fit": Call(
            new_gp, lambda s, **k: s.fit(**k, progress=False, max_rounds=2), {"X": X, "y": Y, "tol": 1e-2}
        ),
        "DualGP.fit options": Call(
            new_gp,
            lambda s, **k: s.fit(X, Y, progress=False, learn_hyperparameters=False, learn_inducing=False, **k),
            {"tol": 1e-2, "max_rounds": 2, "batch_size": None, "generator": seeded()},
        ),
        "DualGP.fit again": Call(gp, lambda s, **k: s.fit(**k, progress=False, max_rounds=1), {"X": X, "y": Y}),
        "update window": method(window_gp, "update", X=X, y=Y),
        "predict": method(gp, "predict", x=AT),
        "predict_joint": method(gp, "predict_joint", x=AT),
        "sample": method(gp, "sample", x=AT, num_samples=2, generator=seeded()),
        "forward": Call(gp, lambda s, **k: s(**k), {"x": AT}),
        "forget": Call(gp, lambda s, **k: s.forget(**k), {"ids": _gp("regression").memory.ids[:2].clone()}),
        "fade": method(gp, "fade", factor=0.5),
        "move_inducing": method(gp, "move_inducing", inducing_points=X[:3].clone()),
        "DualGP": function(
            DualGP,
            kernel=kernel(),
            likelihood=LIK,
            mean=None,
            num_inducing=5,
            jitter=1e-6,
            memory=4,
            memory_rule="random",
        ),
        "DualGP at Z": function(
            DualGP, kernel=kernel(), likelihood=LIK, inducing_points=X[:4].clone(), num_outputs=None
        ),
        "ExactGP": function(
            ExactGP, kernel=kernel(), likelihood=LIK, rank=4, num_probes=2, tol=1e-4, max_iterations=50, backend="auto"
        ),
        "ExactGP.fit": Call(
            exact,
            lambda s, **k: s.fit(**k, learn_hyperparameters=False, progress=False),
            {"X": X, "y": Y, "lr": 0.1, "max_steps": 2, "tol": 1e-4},
        ),
        "ExactGP.predict": method(exact, "predict", x=AT),
        "ExactGP.predict_mean": method(exact, "predict_mean", x=AT),
        "ExactGP.posterior": method(exact, "posterior", num_inducing=4),
        "Conditioned.predict": method(conditioned, "predict", x=AT),
        "Conditioned.predict_joint": method(conditioned, "predict_joint", x=AT),
        "InducingBasis": function(
            InducingBasis, kernel=kernel(), inducing_points=X[:4].clone(), mean=None, jitter=1e-6
        ),
        "Posterior": function(Posterior, basis=basis()),
        "Posterior.predict": method(posterior, "predict", x=AT),
        "Posterior.predict_blocks": method(posterior, "predict_blocks", x=AT),
        "Posterior.predict_joint": method(posterior, "predict_joint", x=AT),
        "Posterior.sample": method(posterior, "sample", x=AT, num_samples=2, generator=seeded()),
        "Posterior.add": method(posterior, "add", x=X, sites=sites()),
        "Posterior.remove": method(posterior, "remove", x=X, sites=sites()),
        "Posterior.scale": method(posterior, "scale", factor=0.5),
        "Posterior.temper": method(posterior, "temper", temperature=2.0),
        "Posterior.rebase": method(posterior, "rebase", basis=basis().at(X[:5])),
        "Sites": function(Sites, lam=Y.clone(), beta=torch.ones(12, dtype=F64)),
        "WeightSite": function(WeightSite, lam=_mean(), B=_mean().abs() + 1),
        "dual_parameters": function(
            dualgp.dual_parameters, likelihood=LIK, y=Y, mean=Y.clone(), var=torch.ones(12, dtype=F64)
        ),
        "expected_log_prob": function(
            dualgp.expected_log_prob, likelihood=LIK, y=Y, mean=Y.clone(), var=torch.ones(12, dtype=F64)
        ),
        "expected_log_prob labels": function(
            dualgp.expected_log_prob,
            likelihood=BernoulliLikelihood(),
            y=LABELS,
            mean=Y.clone(),
            var=torch.ones(12, dtype=F64),
        ),
        "log_predictive of": function(
            dualgp.log_predictive, likelihood=LIK, y=Y, mean=Y.clone(), var=torch.ones(12, dtype=F64)
        ),
        "predictive_distribution": function(
            dualgp.predictive_distribution, likelihood=LIK, mean=Y.clone(), var=torch.ones(12, dtype=F64)
        ),
        "laplace_sites": function(dualgp.laplace_sites, likelihood=SOFTMAX, y=CLASSES, f=net()(X).detach()),
        "greedy_variance": function(dualgp.greedy_variance, kernel=kernel(), x=X, num_inducing=3),
        "LazyKernel": function(LazyKernel, kernel=kernel(), x=X, z=AT, backend="auto"),
        "leave_one_out": function(
            dualgp.leave_one_out, q=_gp("regression"), x=X, y=Y, sites=regression_sites(), likelihood=LIK, max_hat=None
        ),
        "leave_one_out classes": function(
            dualgp.leave_one_out, q=network(), x=X, y=CLASSES, sites=coupled_sites(), likelihood=SOFTMAX
        ),
        "leave_group_out": function(
            dualgp.leave_group_out,
            q=_gp("regression"),
            x=X,
            y=Y,
            sites=regression_sites() * 0.1,
            likelihood=LIK,
            groups=[[0, 1], [3]],
        ),
        "leverage": function(dualgp.leverage, q=_gp("regression"), x=X, sites=regression_sites()),
        "leverage_by_class": function(dualgp.leverage_by_class, q=network(), x=X, sites=coupled_sites()),
        "sensitivity": function(dualgp.sensitivity, q=_gp("regression"), x=X, sites=regression_sites(), max_hat=None),
        "perturb": function(dualgp.perturb, q=posterior(), x=X, sites=sites(), eps=0.1),
        "sum_by": function(dualgp.sum_by, values=Y, labels=CLASSES, num_labels=3),
        "mislabelled": function(dualgp.mislabelled, left_out=left_out(), count=3),
        "validation_influence": function(
            dualgp.validation_influence,
            q=_gp("regression"),
            x=X,
            sites=regression_sites(),
            x_val=AT,
            y_val=AT[:, 0],
            likelihood=LIK,
        ),
        "network_gp": function(
            lambda network, x, y, **k: network_gp(network, (x, y), **k, progress=False),
            network=net(),
            x=X,
            y=CLASSES,
            likelihood=SOFTMAX,
            prior_precision=1.0,
        ),
        "network_gp sparse": function(
            lambda **k: network_gp(net(), (X, CLASSES), SOFTMAX, progress=False, **k),
            num_inducing=4,
            generator=seeded(),
        ),
        "network_gp at Z": function(
            lambda **k: network_gp(net(), (X, CLASSES), SOFTMAX, progress=False, **k),
            inducing_inputs=X[:4].clone(),
            outputs="coupled",
        ),
        "from_weight_decay": function(dualgp.from_weight_decay, value=1e-3, num_data=100, loss_scale=1.0),
        "JacobianBasis": function(JacobianBasis.at_inputs, jacobian=jacobian(), Z=X[:4].clone(), prior_precision=1.0),
        "NetworkJacobian": function(NetworkJacobian, network=net(), example=X),
        "WeightPosterior": function(
            WeightPosterior, layout=layout(), prior_mean=_mean(), prior_precision=_mean().abs() + 1
        ),
        "WeightPosterior.sample": method(weights, "sample", num_samples=2, generator=seeded()),
        "WeightPosterior.predict_samples": method(
            weights, "predict_samples", network=net(), x=X, num_samples=2, generator=seeded()
        ),
        "WeightPosterior.add": method(weights, "add", site=weights().site),
        "WeightPosterior.remove": method(weights, "remove", site=weights().site * 0.5),
        "WeightPosterior.scale": method(weights, "scale", factor=0.5),
        "WeightPosterior.temper": method(weights, "temper", temperature=2.0),
        "merge": function(dualgp.merge, posteriors=[weights(), weights()], weights=[0.5, 0.5]),
        "task_arithmetic": function(transfer.task_arithmetic, posteriors=[weights(), weights()], weights=[0.5, 0.5]),
        "average": function(transfer.average, posteriors=[weights(), weights()], weights=[0.5, 0.5]),
        "fisher_average": function(transfer.fisher_average, posteriors=[weights(), weights()], weights=[0.5, 0.5]),
        "transfer.forget": function(transfer.forget, merged=weights(), posterior=weights(), weight=0.1),
        "transfer.temper": function(transfer.temper, q=weights(), temperature=2.0),
        "fine_tuned": function(transfer.fine_tuned, base=weights(), mean=_mean(), curvature=_mean().abs()),
        "expanded_site": function(transfer.expanded_site, mean=_mean(), gradient=_mean(), curvature=_mean().abs()),
        "FederatedServer.start": function(
            transfer.FederatedServer.start, prior=weights().as_prior(), clients=["a", "b"], rho=0.5, penalty=1.0
        ),
        "FederatedServer.task": method(server, "task", client="a"),
        "FederatedServer.close": method(server, "close", replies=[server().task("a").reply(_mean(), _mean().abs())]),
        "ClientTask.reply": Call(
            lambda: server().task("a"), lambda s, **k: s.reply(**k), {"mean": _mean(), "curvature": _mean().abs()}
        ),
        "MemorySet.of": function(
            transfer.MemorySet.of, network=net(), x=X, y=CLASSES, weights=torch.ones(12, dtype=F64)
        ),
        "soft_labels": function(transfer.soft_labels, memory=memory(), likelihood=SOFTMAX, temperature=1.0),
        "replay": function(transfer.replay, x=X, y=CLASSES, likelihood=SOFTMAX, weights=torch.ones(12, dtype=F64)),
        "select_memory": function(
            transfer.select_memory, f=net()(X).detach(), y=CLASSES, likelihood=SOFTMAX, size=4, generator=seeded()
        ),
        "KPrior.of": function(
            transfer.KPrior.of, network=net(), x=X, likelihood=SOFTMAX, prior_precision=1.0, prior_mean=0.0
        ),
        "mcallester": function(transfer.mcallester, risk=0.1, kl=2.0, n=100, delta=0.05),
        "seeger": function(transfer.seeger, risk=0.1, kl=2.0, n=100, delta=0.05),
        "catoni": function(transfer.catoni, risk=0.1, kl=2.0, n=100, delta=0.05),
        "alquier": function(transfer.alquier, risk=0.1, kl=2.0, n=100, delta=0.05),
        "gibbs_risk": function(transfer.gibbs_risk, losses=(Y > 0).double().expand(3, 12).clone()),
        "bma_risk": function(transfer.bma_risk, log_prob=net()(X).detach().log_softmax(-1).unsqueeze(0), y=CLASSES),
        "select": function(active.select, q=_gp("labels"), x=AT, count=2, rule="bald", generator=seeded()),
        "select classes": function(
            active.select, q=network(), x=AT, count=2, rule="entropy", shortlist=None, generator=seeded()
        ),
        "select for targets": function(
            active.select,
            q=_gp("regression"),
            x=AT,
            count=2,
            rule="reduction",
            targets=AT[:2].clone(),
            generator=seeded(),
        ),
        "score": function(active.score, q=_gp("regression"), x=AT, rule="variance", generator=seeded()),
        "core_set": function(
            active.core_set, q=_gp("regression"), x=X, sites=regression_sites(), count=3, by="leverage"
        ),
        "PoolLoop": function(active.PoolLoop, model=gp(), pool=AT, rule="variance", level=None, shortlist=None),
        "PoolLoop.ask": method(pool, "ask", count=2),
        "PoolLoop.tell": method(pool, "tell", ids=torch.tensor([0, 1]), y=torch.zeros(2, dtype=F64)),
        "IVON": function(
            lambda **k: optim.IVON([p.detach().clone().requires_grad_() for p in net().parameters()], **k),
            lr=0.1,
            num_data=12,
            prior_precision=1.0,
            temperature=1.0,
            init_std=0.1,
            total_steps=10,
        ),
        "IVON of": function(
            optim.IVON, params=[torch.ones(3, requires_grad=True)], num_data=12, prior_precision=1.0, total_steps=10
        ),
        "Stop": function(active.Stop, budget=3, tol=0.1, patience=2),
    }
    calls |= _optimisers() | _pictures()
    for name, of in (
        ("network", network),
        ("sparse network", sparse_network),
        ("kronecker network", kronecker_network),
    ):
        calls |= {
            f"{name}.predict": method(of, "predict", x=AT),
            f"{name}.predict_blocks": method(of, "predict_blocks", x=AT),
            f"{name}.predict_joint": method(of, "predict_joint", x=AT),
            f"{name}.sample": method(of, "sample", x=AT, num_samples=2, generator=seeded()),
            f"{name}.predict_likelihood": method(of, "predict_likelihood", x=AT),
            f"{name}.nlpd": method(of, "nlpd", x=X, y=CLASSES),
            f"{name}.sites_at": method(of, "sites_at", x=X, y=CLASSES),
            f"{name}.leave_one_out": method(of, "leave_one_out", x=X, y=CLASSES),
            f"{name}.condition": method(of, "condition", x=AT, y=CLASSES[:5]),
            f"{name}.forget": method(of, "forget", x=X[:2].clone(), y=CLASSES[:2].clone()),
            f"{name}.add": Call(of, lambda s, **k: s.add(**k), {"x": X, "sites": of().sites_at(X, CLASSES)}),
            f"{name}.with_prior_precision": method(of, "with_prior_precision", prior_precision=2.0),
            f"{name}.log_marginal_likelihood": method(of, "log_marginal_likelihood"),
            f"{name}.with_centre": method(of, "with_centre", centre="map"),
        }
    return calls


def _optimisers() -> dict[str, Call]:
    shared = {"lr": 0.1, "num_data": 12, "prior_precision": 1.0, "beta1": 0.9, "mc_samples": 1}
    rules: dict[str, tuple[Any, dict[str, Any]]] = {
        "EVON": (
            optim.EVON,
            {"temperature": 1.0, "init_std": 0.1, "total_steps": 20, "clip_radius": 1.0, "basis_every": 3},
        ),
        "AdditiveBLR": (optim.AdditiveBLR, {"noise_std": 0.01}),
        "AffineBLR": (optim.AffineBLR, {"temperature": 1.0, "lr_scale": 0.1, "scale_init": 0.01, "beta2": 0.99}),
        "MultiplicativeBLR": (optim.MultiplicativeBLR, {"temperature": 1.0, "offset": 1e-5}),
    }
    calls = {
        name: function(lambda rule=rule, **k: rule(parameters(), **k), **shared, **own)
        for name, (rule, own) in rules.items()
    }
    return calls | {
        "BSAM": function(
            lambda **k: optim.BSAM(parameters(), **k),
            **{"lr": 0.1, "num_data": 12, "prior_precision": 1.0, "sam_radius": 0.1, "beta1": 0.9, "beta2": 0.99},
            **{"damping": 0.1, "precision_init": 1.0},
        ),
        "VOGN": function(vogn, **shared, temperature=1.0, beta2=0.99, damping=0.1, init_std=0.1),
        "VOGN.step": Call(vogn, lambda s, **k: s.step(**k), {"x": X, "y": CLASSES}),
        "prune": function(lambda **k: optim.prune(network=copy.deepcopy(net()), **k), q=weights(), fraction=0.3),
        "merge_shards": function(shards, base_precision=1.0),
    }


def _pictures() -> dict[str, Call]:
    images, square = X.expand(2, 12, 2).clone(), (0.0, 1.0, 0.0, 1.0)
    line, p = torch.linspace(0, 1, 12, dtype=F64).unsqueeze(-1), 0.9 * torch.eye(3, dtype=F64)[CLASSES]
    return {
        "plot_data_scores_2d": plot(plotting.plot_data_scores_2d, x=X, scores=Y, chosen=torch.arange(3)),
        "plot_images": plot(plotting.plot_images, images=images, columns=6),
        "plot_sensitivity_images": plot(
            plotting.plot_sensitivity_images, images=images, scores=Y[:2], columns=2, rows=2
        ),
        "plot_leverage": plot(plotting.plot_leverage, _gp("regression"), x=X, sites=regression_sites()),
        "plot_posterior_1d": plot(plotting.plot_posterior_1d, line_gp(), x=line),
        "plot_reliability": plot(plotting.plot_reliability, Categorical(probs=p), y=CLASSES, num_bins=5),
        "plot_sites": plot(plotting.plot_sites, x=line, sites=regression_sites()),
        "plot_posterior_1d data": plot(
            lambda ax, X, y: plotting.plot_posterior_1d(ax, line_gp(), line, data=(X, y)), X=line, y=Y
        ),
        "plot_decision_2d data": plot(
            lambda ax, X, y: plotting.plot_decision_2d(ax, _gp("labels"), square, data=(X, y), resolution=5),
            X=X,
            y=LABELS,
        ),
        "plot_stream_1d past": plot(
            lambda ax, X, y: plotting.plot_stream_1d(ax, line_gp(), line, past=(X, y)), X=line, y=Y
        ),
        "plot_stream_2d past": plot(
            lambda ax, X, y: plotting.plot_stream_2d(ax, _gp("labels"), square, past=(X, y), resolution=5),
            X=X,
            y=LABELS,
        ),
        "plot_decision_2d": plot(plotting.plot_decision_2d, _gp("labels"), square, resolution=5),
        "plot_score_2d": plot(
            plotting.plot_score_2d, _gp("labels"), square, generator=seeded(), resolution=5, chosen=AT
        ),
        "plot_stream_1d": plot(plotting.plot_stream_1d, line_gp(), x=line),
        "plot_stream_2d": plot(plotting.plot_stream_2d, _gp("labels"), square, resolution=5),
        "plot_sweep": plot(plotting.plot_sweep, grid=line[1:, 0], curves={"NLPD": Y[1:]}),
    }


@functools.cache
def calls() -> dict[str, Call]:
    return _calls()


# --- how it is spoiled ------------------------------------------------------------------------------


def _one(t: Tensor, value: float) -> Tensor:
    t = t.clone()
    t.view(-1)[:1] = value
    return t


def _inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda t: None,
    "array": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "text": lambda t: "x",
    "number": lambda t: 3.0,
    "scalar": lambda t: torch.tensor(1.0, dtype=F64),
    "flat": lambda t: t.reshape(-1),
    "first": lambda t: t[0],
    "deeper": lambda t: t.unsqueeze(0),
    "column": lambda t: t.unsqueeze(-1),
    "turned": lambda t: t.mT.contiguous() if t.ndim > 1 else t.flip(0),
    "wider": lambda t: torch.cat([t, t], -1),
    "narrower": lambda t: t[..., :-1],
    "shorter": lambda t: t[:-1],
    "one row": lambda t: t[:1],
    "no rows": lambda t: t[:0],
    "no columns": lambda t: t[..., :0],
    "twice": lambda t: torch.cat([t, t]),
    "copies of a row": lambda t: t[:1].expand_as(t).clone(),
    "int64": lambda t: t.long(),
    "int8": lambda t: t.to(torch.int8),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "float32": lambda t: t.float(),
    "float64": lambda t: t.double(),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "one NaN": lambda t: _one(t.double(), NAN),
    "one infinity": lambda t: _one(t.double(), -INF),
    "all NaN": lambda t: torch.full_like(t.double(), NAN),
    "huge": lambda t: t.double() * 1e30,
    "one huge": lambda t: _one(t.double(), 1e30),
    "tiny": lambda t: t.double() * 1e-30,
    "zero": torch.zeros_like,
    "negative": lambda t: -t - 1,
    "halves": lambda t: t.double() + 0.5,
    "out of range": lambda t: _one(t, 99),
    "requires grad": lambda t: t.detach().double().clone().requires_grad_(),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "inference": _inference,
}
NUMBERS: dict[str, Callable[[Any], Any]] = {
    name: lambda _, value=value: value
    for name, value in {
        "none": None,
        "text": "x",
        "NaN": NAN,
        "infinity": INF,
        "−infinity": -INF,
        "negative": -1,
        "zero": 0,
        "a half": 0.5,
        "huge": 1e30,
        "tiny": 1e-300,
        "true": True,
        "list": [1.0, 2.0],
        "seven": 7,
        "scalar": torch.tensor(0.3, dtype=F64),
        "vector": torch.ones(2, dtype=F64),
        "complex": 1j,
        "meta": torch.ones((), device="meta"),
        "NaN in a tensor": torch.tensor(NAN),
    }.items()
}
OTHERS: dict[str, Callable[[Any], Any]] = {
    name: lambda _, value=value: value
    for name, value in {
        "none": None,
        "text": "x",
        "number": 3,
        "list": [],
        "list of none": [None],
        "dict": {},
        "tensor": torch.ones(2),
        "type": int,
        "module": nn.Linear(2, 2),
        "NaN": NAN,
    }.items()
}
SITES: dict[str, Callable[[Sites], Any]] = {
    "shorter": lambda s: s[:-1],
    "none left": lambda s: s[:0],
    "NaN": lambda s: Sites(s.lam * NAN, s.beta, s.multi_output),
    "huge": lambda s: s * 1e30,
    "tiny": lambda s: s * 1e-30,
    "zero": lambda s: s * 0.0,
    "negative": lambda s: s * -1.0,
    "float32": lambda s: Sites(s.lam.float(), s.beta.float(), s.multi_output),
    "other outputs": lambda s: Sites(s.lam.unsqueeze(-1), s.lam.unsqueeze(-1), True),
}


def ways(value: Any) -> dict[str, Callable[[Any], Any]]:
    """The ways in which an argument can be spoiled."""
    if isinstance(value, Tensor):
        return TENSORS
    if isinstance(value, Sites):
        return SITES
    if isinstance(value, int | float) or value is None:
        return NUMBERS
    return OTHERS if isinstance(value, torch.Generator) else {}  # what is no datum is asked for by its type


ELEMENTWISE = {
    "dual_parameters",
    "expected_log_prob",
    "log_predictive",
    "predictive_distribution",
    "sum_by",
    "WeightPosterior.predict_samples",
    "VOGN.step",
    "mcallester",
    "alquier",
}  # NaN of NaN, infinity of infinity


def everything() -> list[tuple[str, str, str]]:
    return [(name, arg, way) for name, call in calls().items() for arg, v in call.given.items() for way in ways(v)]


# --- the law ----------------------------------------------------------------------------------------


def state(of: Any) -> Any:
    """All that tells two values apart."""
    if isinstance(of, DualGP | ExactGP):
        return {k: v.clone() for k, v in of.state_dict().items()}, of.generator.get_state()
    if isinstance(of, active.PoolLoop):
        return copy.deepcopy(of.state_dict()), state(of.model)
    if isinstance(of, nn.Module):
        return {k: v.clone() for k, v in of.state_dict().items()}
    if isinstance(of, WeightPosterior):
        return of.mean.clone(), of.precision.clone()
    if isinstance(of, transfer.FederatedServer):
        return state(of.posterior), of.round
    if isinstance(of, Tensor):
        return (str(of.device), of.shape) if of.is_meta else of.detach().to_dense().clone()
    if isinstance(of, Axes):
        return [type(child).__name__ for child in of.get_children()], of.get_xlim(), of.get_title()
    if isinstance(of, optim.SampledOptimizer):
        return state([p for group in of.param_groups for p in group["params"]])
    if isinstance(of, torch.Generator):
        return None  # is there to be drawn from
    if hasattr(of, "predict"):
        return [t.clone() for t in of.predict(AT)]
    if isinstance(of, list | tuple):
        return [state(v) for v in of]
    return None


def finite(of: Any) -> bool:
    """Whether all numbers in a result are."""
    if isinstance(of, Tensor):
        return of.is_meta or not of.is_floating_point() or bool(of.isfinite().all())
    if isinstance(of, float):
        return abs(of) < INF
    if isinstance(of, list | tuple):
        return all(map(finite, of))
    if isinstance(of, DualGP | ExactGP):
        return True
    if isinstance(of, Sites | WeightSite):
        return True  # they hold what they are given; posteriors do not take all of it
    if isinstance(of, WeightPosterior):
        return finite(state(of))
    if isinstance(of, Posterior) or type(of).__name__ in ("NetworkPosterior", "Conditioned"):
        return finite(of.predict(AT))
    return True


def deliberate(error: Exception) -> bool:
    """Whether an error was raised by a line of dualgp's own that says so."""
    if isinstance(error, errors.DualGPError):
        return True
    if not isinstance(error, ValueError | TypeError):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename.startswith(ROOT) and linecache.getline(last.filename, last.lineno).strip().startswith("raise ")


def obey(name: str, *spoiled: tuple[str, str]) -> str | None:
    """What is wrong with how a call takes arguments spoiled in these ways; None if nothing is."""
    call = calls()[name]
    subject, given = call.of(), dict(call.given)
    for arg, way in spoiled:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                given[arg] = ways(call.given[arg])[way](given[arg])
        except Exception:
            return None  # nothing to spoil so
    generators = {k: seeded() for k, v in given.items() if isinstance(v, torch.Generator)}
    given |= generators
    before, arguments, rng = state(subject), {k: state(v) for k, v in given.items()}, torch.get_rng_state()
    weights_before = state(net())
    wrong = None
    try:
        with warnings.catch_warnings(), unchecked():
            warnings.simplefilter("ignore")
            result = call.how(subject, **given)
            if not finite(result) and name.split(" ")[0] not in ELEMENTWISE:
                wrong = "not finite"
    except Exception as error:
        if not deliberate(error):
            where = traceback.extract_tb(error.__traceback__)
            ours = [f for f in where if f.filename.startswith(ROOT)] or where
            told = str(error).splitlines() or [""]
            wrong = f"{type(error).__name__}: {told[0][:120]} ({Path(ours[-1].filename).name}:{ours[-1].lineno})"
        elif not same_bits(state(subject), before):
            wrong = f"state changed by what was refused: {error}"
    if not same_bits({k: state(v) for k, v in given.items()}, arguments):
        wrong = f"arguments changed ({wrong})"
    seeded_by_torch = given.get("generator", rng) is None  # as asked for
    if not torch.equal(torch.get_rng_state(), rng) and not seeded_by_torch:
        wrong = f"the global random state moved ({wrong})"
    if not same_bits(state(net()), weights_before):
        wrong = f"the network changed ({wrong})"
    return wrong
