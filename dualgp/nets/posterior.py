"""`NetworkPosterior`: what a trained network knows and how well, as a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import Likelihood, SoftmaxLikelihood
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

from dualgp.errors import check_count
from dualgp.fingerprints import Held
from dualgp.influence import LeftOut
from dualgp.jacobian import JacobianBasis, Precision
from dualgp.laplace import laplace_sites
from dualgp.nets import evidence, links, storage, tuning
from dualgp.nets.centre import Centre, Recentring, recentred
from dualgp.nets.data import Batch, check_data, rows_of
from dualgp.nets.growth import with_room
from dualgp.nets.leaving_out import one_by_one
from dualgp.nets.links import Link
from dualgp.nets.rescaling import under_prior
from dualgp.nets.spectrum import Spectrum, StructuredSpectrum
from dualgp.nets.stationarity import Stationarity, stationarity
from dualgp.nets.structured import StructuredPosterior
from dualgp.nets.terms import Terms, WeightPosterior, terms_of, terms_through, with_site
from dualgp.nets.tuning import Method
from dualgp.predictive import log_predictive, mean_nlpd, predictive_distribution
from dualgp.sites import Sites


@dataclass(frozen=True, eq=False)
class NetworkPosterior:
    """A trained network, linear in its weights around them, as a Gaussian process with a likelihood; a value.

    Made by `network_gp` or `load`. Every verb returns a new one; inputs are [n, *input_shape], functions [n, C].

    Args:
        posterior: the waist, in the coordinates of a `JacobianBasis`, or block-diagonal over layers; what the functions
            of `dualgp.influence` ask.
        likelihood: a frozen copy.
        centre: "network" (the mean is the network's output, moved by new data only) or "map" (it is that of the
            linearised model under the prior N(0, τ⁻¹I)).
        num_data: how many data are held.
        log_likelihood: Σ log p(y_i|f(x_i; θ*)) of them; None once sites without targets were added or removed.
        pull: Jᵀα [P] of the data that the network was converted with.
        held: fingerprints of the data that are held.
        recentring: what they add to λ and log Z under centre "map" and not under "network".
        has_forgotten: whether data were taken out.
    """

    posterior: WeightPosterior
    likelihood: Likelihood
    centre: Centre
    num_data: int
    log_likelihood: float | None
    pull: Tensor
    held: Held
    recentring: Recentring
    has_forgotten: bool = False

    def __repr__(self) -> str:
        """One line: what is held, in what form."""
        tau = self.prior_precision
        prior = f"{tau:.4g}" if isinstance(tau, float) else "one for each parameter tensor"
        inducing = self.basis.inducing_inputs
        if isinstance(self.posterior, StructuredPosterior):
            form = f"{self.posterior.structure.kind} over {self.basis.size} weights"
        elif inducing is None:
            form = f"dense over {self.basis.size} weights"
        else:
            form = f"{self.basis.size} coordinates at {len(inducing)} inputs"
        return (
            f"{type(self).__name__}({self.num_data} data, {self.num_outputs} outputs, {form}, "
            f"prior_precision={prior}, centre={self.centre!r})"
        )

    @property
    def basis(self) -> JacobianBasis:
        """The coordinates."""
        return self.posterior.basis

    @property
    def num_outputs(self) -> int:
        """C."""
        return self.basis.num_outputs

    @property
    def prior_precision(self) -> Precision:
        """τ, beside a loss that is summed over data; or one for each parameter tensor."""
        return self.basis.prior_precision

    @property
    def stationarity(self) -> Stationarity:
        """Whether θ* is a maximum under this prior precision, on the data it was converted with; print it."""
        return stationarity(self.basis, self.pull, self.centre)

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the latent f(x), each [n, C]."""
        return self.posterior.predict(x)

    def predict_blocks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean [n, C] and covariance between the outputs of each datum [n, C, C]."""
        return self.posterior.predict_blocks(x)

    def predict_joint(self, x: Tensor) -> MultivariateNormal:
        """Return the joint Gaussian of f(x), a MultitaskMultivariateNormal: (nC)² numbers."""
        return self.posterior.predict_joint(x)

    def sample(self, x: Tensor, num_samples: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        """Return joint draws of f(x), [S, n, C]."""
        return self.posterior.sample(x, num_samples, generator=generator)

    def predict_likelihood(
        self,
        x: Tensor,
        *,
        link: Link = "probit",
        num_samples: int = 1000,
        generator: torch.Generator | None = None,
        **params: Tensor,
    ) -> Distribution:
        """Return p(y|x) as a torch Distribution over n data: Categorical for softmax, Normal with the noise, and so on.

        Args:
            x: inputs.
            link: how logits become class probabilities: "probit", "mc" or "bridge" (see `nets.links`). Other
                likelihoods are integrated to quadrature accuracy, and need none.
            num_samples: for "mc".
            generator: for "mc"; a fixed seed if None.
            params: per-datum parameters, such as `noise` [n].

        Raises:
            InputError: for inputs of the wrong shape, or an unknown link.
        """
        if isinstance(self.likelihood, SoftmaxLikelihood):
            log_p = self._class_log_probs(x, link, num_samples, generator)
            return Categorical(logits=log_p.to(self.basis.dtype), validate_args=None if len(x) else False)
        mean, var = (t.squeeze(-1) if t.shape[-1] == 1 else t for t in self.predict(x))
        with torch.no_grad():
            return predictive_distribution(self.likelihood, mean, var, **params)

    def log_predictive(
        self,
        x: Tensor,
        y: Tensor,
        *,
        link: Link = "probit",
        num_samples: int = 1000,
        generator: torch.Generator | None = None,
        **params: Tensor,
    ) -> Tensor:
        """Return log p(yᵢ|xᵢ), [n] or [n, C], in float64. Arguments as in `predict_likelihood`."""
        x, y, params = self._check(x, y, params)
        if isinstance(self.likelihood, SoftmaxLikelihood):
            log_p = self._class_log_probs(x, link, num_samples, generator)
            return log_p.gather(-1, y.long().unsqueeze(-1)).squeeze(-1)
        mean, var = (t.reshape(y.shape) for t in self.predict(x))
        with torch.no_grad():
            return log_predictive(self.likelihood, y, mean, var, **params)

    def nlpd(self, x: Tensor, y: Tensor, **options: Any) -> float:
        """Return the mean negative log predictive density, in nats per datum (lower is better).

        Raises:
            InputError: as in `log_predictive`, and if there are no data, of which there is no mean.
        """
        return mean_nlpd(self.log_predictive(x, y, **options))

    def sites_at(self, x: Tensor, y: Tensor, **params: Tensor) -> Sites:
        """Return the sites that data have at the network, λ = α + βf(x; θ*); nothing is added."""
        x, y, params = self._check(x, y, params)
        f = self.basis.jacobian(x)
        sites = laplace_sites(self.likelihood, y, f, **params)
        return sites if self.basis.coupled else sites.decoupled(f.double())

    def leave_one_out(self, x: Tensor, y: Tensor, **params: Tensor) -> LeftOut:
        """Return every training datum predicted without it (see `dualgp.leave_one_out`): as after `forget` of it.

        What is taken out is what is there: of data that were added before Z grew, sites on the coordinates that they
        were seen through, which the functions of `dualgp.influence` take for sites on all.

        Raises:
            InputError: if one is not in the posterior, and so cannot be left out.

        Warns:
            NumericalWarning: if removals were capped (see `LeftOut.capped`).
        """
        return one_by_one(self, *self._check(x, y, params))

    def condition(self, x: Tensor, y: Tensor, *, grow: int | None = None, **params: Tensor) -> NetworkPosterior:
        """Return the posterior given more data, without retraining: their sites at θ* are added.

        Where w spans what the outputs at Z see, Z takes in those of the new inputs of which it sees too little: without
        them, new data elsewhere would leave the variance there as it was. Nothing is lost of the old data by that.

        The variance is that of a network converted with all data; the mean moves by what the new data pull,
        f(x; θ*) + V(x, X₂)α₂ for centre "network". The prior precision stays, where a loss averaged over data would
        have let it grow with their number.

        Args:
            x: new inputs [n, *input_shape].
            y: their targets.
            grow: how many of x Z may take in; None: half as many as it has and 50 at least; 0: Z stays.
            params: per-datum parameters, such as `noise` [n].

        Raises:
            InputError: for data of the wrong shape, targets outside the likelihood's support, or a `grow` that is no
                whole number ≥ 0.

        Source: Scannell et al. 2024 (SFR), eq. 14, with the mean anchored at the network.
        """
        x, y, params = self._check(x, y, params)
        if grow is not None:
            check_count("grow", grow, 0)
        if not len(x):
            return self
        sites = self.sites_at(x, y, **params)
        q = with_room(self, x, float(sites.beta.max()), grow)
        held = self.held.add(rows_of(Batch(x, y, params), self.basis.dtype), q.basis.size)
        return q._plus(terms_of(q.posterior, x, sites), 1, len(x), self._log_prob(x, y, params), held)

    def forget(self, x: Tensor, y: Tensor, **params: Tensor) -> NetworkPosterior:
        """Return the posterior without these data, exactly: as if their sites at θ* had never been added.

        Structure "kronecker" is approximate in part: a whole set of data, as converted or added at once, goes without a
        trace, but the product of all N does not contain that of n of them. Beside a conversion of the rest, B of a
        layer is then off by [n/N · G_rest − (1 − n/N) · G_gone] ⊗ (A_gone − A_rest), G = Σgᵀβg and A the mean of aaᵀ:
        little for a fair sample of the data (1 % of the variance at a quarter of them, 6 % for the worst of few data);
        of the size of what is forgotten for single data; and for a corner of input space there may be no Gaussian left.

        For centre "network" the evidence of what is left supposes a network that was trained to its maximum: elsewhere
        it is that of no model, and asking for it warns.

        Raises:
            InputError: if one is not in the posterior (never added with this target, or forgotten already).
            NotPositiveDefiniteError: if no Gaussian is left of a sum of Kronecker products.
        """
        x, y, params = self._check(x, y, params)
        if not len(x):
            return self
        rows = rows_of(Batch(x, y, params), self.basis.dtype)
        sizes = self.held.sizes_of(rows)
        terms = terms_through(self.posterior, x, self.sites_at(x, y, **params), sizes)
        held = self.held.remove(rows, sizes)
        left = self._plus(terms, -1, -len(x), -self._log_prob(x, y, params), held)
        return dataclasses.replace(left, has_forgotten=True)

    def add(self, x: Tensor, sites: Sites) -> NetworkPosterior:
        """Return the posterior with sites of your own added; the evidence is not known from then on."""
        return self._plus(terms_of(self.posterior, x, sites), 1, len(x), None, self.held)

    def remove(self, x: Tensor, sites: Sites) -> NetworkPosterior:
        """Return the posterior with sites taken out, whatever data they are of; see `forget`, which checks.

        Raises:
            NotPositiveDefiniteError: if no Gaussian is left.
        """
        left = self._plus(terms_of(self.posterior, x, sites), -1, -len(x), None, self.held)
        return dataclasses.replace(left, has_forgotten=True)

    def with_prior_precision(self, prior_precision: Precision) -> NetworkPosterior:
        """Return the posterior of the same data under another prior, exactly and without the data.

        Raises:
            InputError: if it is not positive and finite.
            BasisMismatchError: if it changes by other factors from tensor to tensor in a sparse basis, which then
                spans other directions: convert anew.
        """
        return under_prior(self, prior_precision)

    def with_centre(self, centre: Centre) -> NetworkPosterior:
        """Return the posterior with the mean of the other centre, as if converted with it; without the data.

        Raises:
            InputError: if it is not "network" or "map".
        """
        return recentred(self, centre)

    def log_marginal_likelihood(self, prior_precision: Precision | None = None) -> float:
        """Return log Z, the evidence, at this prior precision or another one: O(rank) after the first call.

        log Z = Σ log p(y_i|f_i) − ½τ|θ*|² − ½ log|P| + ½ λᵀP⁻¹λ:  Laplace's approximation, whose last term is zero
        for centre "network" until data are added or forgotten, and for "map" is what the mean gains by leaving the
        network; there |θ*|² counts what w spans alone, since the rest integrates to 1, and what it does not span
        moves the data by −u from the network (see `dualgp.nets.centre`): Σ −(αᵀu + ½uᵀBu) besides.

        Raises:
            UnsupportedError: if sites without targets were added or removed.

        Warns:
            NumericalWarning: for centre "network" after `forget`, if the network is no maximum: the pull of the data it
                was converted with counts as that of the prior, and what was forgotten of it is then no evidence.

        Source: MacKay 1992; Immer et al. 2021.
        """
        return evidence.at_prior(self, prior_precision)

    def tuned(
        self,
        method: Method = "evidence",
        data: Any = None,
        y: Tensor | None = None,
        *,
        grid: Tensor | Sequence[float] | None = None,
        link: Link = "probit",
        progress: bool | None = None,
    ) -> NetworkPosterior:
        """Return the posterior at the best prior precision, from one eigendecomposition.

        Args:
            method: "evidence" (see `log_marginal_likelihood`); "validation", the log predictive density of data held
                back; "leave_one_out", the same of the training data, each without its own site, by the mean of
                centre "map" (the network itself has seen them all, and would be left as it is: τ → ∞).
            data: for the last two, as in `network_gp`: (x, y), x with `y`, or a loader.
            y: targets, where `data` is x.
            grid: prior precisions to try; four in each decade from 1e-6 to 1e8 if None. The best is refined between its
                neighbours, to about 2 %. Where there is one for each parameter tensor, these are factors on them.
            link: how logits become class probabilities.
            progress: as in `network_gp`.

        Raises:
            InputError: if the method is unknown, data are missing or wrong, or the grid is not positive.

        Example:
            >>> from gpytorch.likelihoods import GaussianLikelihood
            >>> from dualgp import network_gp
            >>> x, net = torch.randn(40, 2), torch.nn.Linear(2, 1)
            >>> q = network_gp(net, (x, net(x)), GaussianLikelihood())
            >>> q.tuned().log_marginal_likelihood() >= q.log_marginal_likelihood()
            True
        """
        task = tuning.Task.of(self, method, data, y, link, progress)
        factors = tuning.factors_of(self, tuning.GRID if grid is None else grid)
        return self.with_prior_precision(task.best(factors) * self.prior_precision)

    def sweep(
        self,
        grid: Tensor | Sequence[float],
        method: Method = "evidence",
        data: Any = None,
        y: Tensor | None = None,
        *,
        link: Link = "probit",
        progress: bool | None = None,
    ) -> Tensor:
        """Return what each prior precision of a grid [k] scores, in nats, higher is better; arguments as in `tuned`.

        Of this posterior as it is centred: `tuned("leave_one_out")` chooses by `q.with_centre("map").sweep(...)`, as a
        network at the centre has seen the datum that is left out, and scores best at τ → ∞.
        """
        return tuning.Task.of(self, method, data, y, link, progress).scores(tuning.factors_of(self, grid))

    def sweep_evidence(self, factors: Tensor) -> Tensor:
        """Return log Z at these multiples [k] of the prior precision, each in O(rank), in float64.

        Raises:
            UnsupportedError: if sites without targets were added or removed.

        Warns:
            NumericalWarning: as `log_marginal_likelihood`.
        """
        return evidence.at_factors(self, factors)

    @cached_property
    def spectrum(self) -> Spectrum | StructuredSpectrum:
        """The data's precision in its eigenbasis, with which other prior precisions are cheap."""
        return evidence.spectrum_of(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything to a safetensors file, atomically; of the data, fingerprints and inducing inputs only."""
        storage.save(self, path)

    @classmethod
    def load(
        cls, path: str | PathLike[str], network: nn.Module, likelihood: Likelihood, *, example: Tensor | None = None
    ) -> NetworkPosterior:
        """Return the posterior saved at `path`, to the same last bit; nothing in the file is executed.

        Args:
            path: written by `save`.
            network: of the architecture that was saved; a copy takes the values in the file.
            likelihood: of the kind that was saved; the same.
            example: two rows of inputs, needed where the posterior has no inducing inputs.

        Raises:
            InputError: if the file is not of this format or version, is damaged, or does not fit the modules.
        """
        return storage.load(cls, path, network, likelihood, example)

    def _plus(self, terms: Terms, sign: int, count: int, log_prob: float | None, held: Held) -> NetworkPosterior:
        """The posterior with what so many data add to it, or without it."""
        known = self.log_likelihood is not None and log_prob is not None
        return dataclasses.replace(
            self,
            posterior=with_site(self.posterior, self.posterior.site + terms.at(self.centre) * sign),
            recentring=self.recentring + terms.recentring * sign,
            num_data=self.num_data + count,
            log_likelihood=self.log_likelihood + log_prob if known else None,  # type: ignore[operator]
            held=held,
        )

    def _log_prob(self, x: Tensor, y: Tensor, params: dict[str, Tensor]) -> float:
        return float(links.log_prob(self.likelihood, y, self.basis.jacobian(x), **params).sum())

    def _check(self, x: Tensor, y: Tensor, params: dict[str, Tensor]) -> Batch:
        return check_data(self.basis, self.likelihood, Batch(x, y, params))

    def _class_log_probs(self, x: Tensor, link: Link, num_samples: int, generator: torch.Generator | None) -> Tensor:
        mean, cov = self.posterior.double_blocks(x)
        return links.class_log_probs(mean, cov, link, num_samples=num_samples, generator=generator)
