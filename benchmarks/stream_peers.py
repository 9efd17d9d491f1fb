"""Who takes part in the benchmarks of streams; each has `update(X, y)`, `predict(x)` and `likelihood`.

- `StreamingSVGP`, Bui, Nguyen & Turner 2017: the past is a site on u. A batch: Z is 70 % old and 30 % new inputs at
  random; then hyperparameters and Z by L-BFGS on their bound, the trace term of a moving Z included, and sites to
  convergence (their code took Adam steps from a q that was reset). Exactly their model for any likelihood.
- `OVC`, Maddox, Stanton & Wilson 2021, by GPyTorch's own `get_fantasy_model`: an SVGP of the first batch, at its
  optimum, is turned into an exact GP on pseudo data, and every batch after is conditioned on. Hyperparameters stay as
  the first batch had them, as its authors do; or those of the fit on all data are given. It keeps every datum and a
  square root of their covariance, hence `cap`: what comes later is not taken in. Gaussian noise only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import gpytorch
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood, Likelihood, SoftmaxLikelihood
from linear_operator.utils.errors import NanError, NotPSDError
from peers import SVGP
from stream_data import ONE_LENGTHSCALE, Split
from torch import Tensor

from dualgp import DualGP
from dualgp.gp import stream, update
from dualgp.gp.data import Data
from dualgp.gp.hybrid import Anchor, stream_bound
from dualgp.gp.hyper import Hyper
from dualgp.gp.mstep import m_step
from dualgp.gp.update import State
from dualgp.posterior import Posterior
from dualgp.sites import Sites

Make = Callable[[int], DualGP]


def model(split: Split, m: int, **options: object) -> DualGP:
    """A Matérn-5/2 model at GPyTorch's defaults; banana from (1, 1), as in the published experiment."""
    ard = None if split.name in ONE_LENGTHSCALE else split.X.shape[-1]
    kernel = ScaleKernel(MaternKernel(ard_num_dims=ard)).double()
    if split.name == "banana":
        kernel.outputscale, kernel.base_kernel.lengthscale = 1.0, 1.0
    likelihood: Likelihood = GaussianLikelihood().double()
    if split.num_classes:
        likelihood = BernoulliLikelihood()
    if split.num_classes > 1:
        likelihood = SoftmaxLikelihood(num_classes=split.num_classes, mixing_weights=False)
    return DualGP(kernel, likelihood, num_inducing=m, **options)


def varied(X: Tensor) -> Tensor:
    """X, with constant columns, which `fit` refuses and the first part of a stream may have, varied by 1e-6."""
    constant = (X - X[0] == 0).all(0)
    return X + 1e-6 * constant * torch.linspace(-1, 1, len(X), dtype=X.dtype).unsqueeze(-1)


def state_bytes(learner: object) -> int:
    """What a learner has to keep between two batches."""
    if isinstance(learner, OVC):
        return learner.state_bytes()
    gp = learner.gp if isinstance(learner, StreamingSVGP) else learner
    assert isinstance(gp, DualGP)
    twice = {"rest_lam", "rest_B"} if isinstance(learner, StreamingSVGP) else set()  # without memory: all of the site
    return sum(v.numel() * v.element_size() for name, v in gp.state_dict().items() if name not in twice)


class StreamingSVGP:
    """Bui et al. 2017 by the parts of this package; it keeps the site on u and nothing else."""

    def __init__(self, gp: DualGP, *, learn_inducing: bool = True) -> None:
        self.gp, self.generator, self.learn_inducing = gp, torch.Generator().manual_seed(0), learn_inducing
        self.likelihood, self.predict = gp.likelihood, gp.predict

    def choose(self, state: State | None, X: Tensor, m: int) -> Tensor:
        """Z where learning begins: 70 % old and 30 % new; old ones that stay keep their place."""
        g = self.generator
        if state is None:
            return X[torch.randperm(len(X), generator=g)[:m]]
        Z = state.basis.inducing_points
        size = min(m, len(Z) + len(X))
        new = min(len(X), max(round(0.3 * m), size - len(Z)))
        gone = torch.randperm(len(Z), generator=g)[: len(Z) + new - size]
        taken = X[torch.randperm(len(X), generator=g)[:new]]
        Z = Z.clone()
        Z[gone] = taken[: len(gone)]
        return torch.cat([Z, taken[len(gone) :]])

    def update(self, X: Tensor, y: Tensor) -> None:
        gp = self.gp
        settings = gp._settings(move_inducing=False)._replace(capacity=0)
        state = stream.read(gp)
        Z = self.choose(state, X, settings.max_inducing)
        if state is None or not self.learn_inducing:
            with torch.no_grad():
                if state is None:
                    gp.inducing_points = Z
                else:
                    stream.write(gp, update.move(state, state.basis.at(Z)))
            stream.take(gp, Data(X, y, False), settings, learn_hyperparameters=True)
            return
        data = Data(X, y, False)
        hyper = gp._hyper(gp.kernel, gp.likelihood, Z, True, True)
        state = self.learn(state, hyper, data, 0.1 * settings.tol)
        with torch.no_grad():
            found = update.find_sites(state, hyper.likelihood, data, None, 0.1 * settings.tol)
            assert found.sites is not None
            ids = torch.arange(len(X))
            batch = update.Memory(data, found.sites, ids, ids.double())
            state = replace(state, posterior=found.posterior, num_seen=state.num_seen + len(X))
            state = update.remember(state, batch, hyper.likelihood, settings)
        gp._take_hyperparameters(hyper)
        stream.write(gp, state)

    @staticmethod
    def learn(state: State, hyper: Hyper, data: Data, tol: float) -> State:
        """Hyperparameters and Z on the bound anchored at the old Z; return prior + rest there."""
        anchor, Z = Anchor.of(state.basis, state.rest, state.noise), hyper.Z.detach().clone()
        with torch.no_grad():
            moved = update.move(state, state.basis.at(Z))
            sites = update.find_sites(moved, hyper.likelihood, data, None, tol).sites
        parameters = hyper.trained()

        def evaluate() -> update._Evaluation:
            own = update.conjugate_sites(hyper, data)
            held: Sites | None = sites if own is None else own
            assert held is not None
            with torch.enable_grad():
                value = stream_bound(hyper, data, held, anchor)
                found = torch.autograd.grad(value, parameters, allow_unused=True)
            gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
            return update._Evaluation(float(value.detach()), gradient)

        iterations, radius = update.M_ITERATIONS, update.TRUST_RADIUS
        m_step(hyper, evaluate, max(1, data.count), max_iter=iterations, tol=tol, radius=radius)
        hyper.round()
        Z = hyper.Z.detach().clone()
        with torch.no_grad():
            hyper.set_inducing(state.basis.inducing_points)
            basis = hyper.basis()
            rest = anchor.carry(hyper, basis.expand(basis.inducing_points), basis.L)
            noise = None if state.noise is None else state.noise.under(float(hyper.likelihood.noise.sum()))
            state = replace(state, posterior=Posterior(basis, rest), rest=rest, memory=None, noise=noise)
            state = update.move(state, basis.at(Z))
            hyper.set_inducing(Z)
        return state


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """GPyTorch by Cholesky alone, whatever the size, so that it loses nothing to approximation."""
    s = gpytorch.settings
    with (
        torch.no_grad(),
        s.fast_computations(False, False, False),
        s.max_cholesky_size(10**6),
        s.max_root_decomposition_size(10**6),
    ):
        yield


class OVC:
    """Online variational conditioning through `get_fantasy_model`.

    Args:
        make: a `DualGP` of M at the hyperparameters to start from, which fits the SVGP of the first batch.
        m: M of the first batch's SVGP, at most.
        learn: whether the first batch's fit learns hyperparameters.
        cap: data it takes in, at most.
    """

    def __init__(self, make: Make, m: int, *, learn: bool, cap: int = 2000) -> None:
        self.make, self.m, self.learn, self.cap = make, m, learn, cap
        self.gp: gpytorch.models.GP | None = None
        self.num_seen, self.stopped = 0, ""

    def begin(self, X: Tensor, y: Tensor) -> None:
        """The SVGP of a batch at its optimum, which natural gradients reach, as GPyTorch's own model."""
        fitted = self.make(min(self.m, len(X)))
        fitted.fit(varied(X), y, learn_inducing=False, learn_hyperparameters=self.learn, progress=False)
        self.likelihood = fitted.likelihood.eval()
        Z = fitted.inducing_points
        assert Z is not None
        svgp = SVGP(fitted.kernel, Z, natural=False, learn_inducing=False, jitter=1e-6).double()
        svgp.likelihood = self.likelihood
        eye = torch.eye(len(Z), dtype=torch.float64)
        with torch.no_grad():
            u = fitted.predict_joint(Z)
            L = torch.linalg.cholesky(fitted.kernel(Z).to_dense() + 1e-6 * eye)
            A = torch.linalg.solve_triangular(L, eye, upper=False)
            q = svgp.variational_strategy._variational_distribution
            q.variational_mean.copy_(A @ u.mean)
            q.chol_variational_covar.copy_(torch.linalg.cholesky(A @ u.covariance_matrix @ A.T + 1e-8 * eye))
            svgp.variational_strategy.variational_params_initialized.fill_(1)
        self.gp = svgp.eval()

    def update(self, X: Tensor, y: Tensor) -> None:
        if self.gp is None:
            self.begin(X, y)
        elif self.num_seen + len(X) > self.cap:
            self.stopped = self.stopped or f"stopped at {self.num_seen}"
            return
        elif not self.stopped:
            of = self.gp.variational_strategy if isinstance(self.gp, SVGP) else self.gp
            try:
                with exactly():
                    self.gp = of.get_fantasy_model(X, y)
            except (NotPSDError, NanError) as error:
                self.stopped = f"{type(error).__name__} at {self.num_seen}"
                return
        self.num_seen += len(X)

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.gp is not None
        with exactly():
            parts = [self.gp(part) for part in x.split(1000)]
            return torch.cat([f.mean for f in parts]), torch.cat([f.variance for f in parts]).clamp_min(1e-10)

    def state_bytes(self) -> int:
        """Inputs, targets, noise, covariance and its inverse root, of pseudo data and data."""
        if isinstance(self.gp, SVGP) or self.gp is None:
            return 8 * (self.m**2 + self.m)
        n, d = self.gp.train_inputs[0].shape
        return 8 * (n * (d + 2) + 2 * n * n)
