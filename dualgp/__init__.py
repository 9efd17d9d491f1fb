"""Gaussian processes and neural networks in dual form.

A posterior is a prior plus *sites*, in the coordinates of a basis: f(x) = μ(x) + φ(x)ᵀw + r(x) with w ~ N(0, I), and a
site is a Gaussian factor t(w) = exp(λᵀw − ½ wᵀBw), so that always P = I + B, w̄ = P⁻¹λ,

    mean(x) = μ(x) + φ(x)ᵀw̄,        var(x) = r(x) + φ(x)ᵀP⁻¹φ(x).

Per datum a site acts on f_i with λ_i = α_i + β_i m_i and β_i, where α_i = E_q[∂ log p(y_i|f)] and
β_i = −E_q[∂² log p(y_i|f)]. Sites are added, removed, scaled and pulled back; the methods are rows of one table:

| method | in site algebra | here |
|---|---|---|
| sparse variational GP | prior + Σ tᵢ | `DualGP.fit` |
| exact GP: Z = X, nothing n × n | prior + Σ tᵢ | `ExactGP.fit`, `LazyKernel` |
| trained network: linearised, in the Jacobian's basis | prior + Σ tᵢ | `network_gp`, `NetworkPosterior` |
| new data, without refitting | q + t_new | `Posterior.add`, `NetworkPosterior.condition` |
| a stream: batch by batch, memory found anew | prior + t_rest + Σ t_memory | `DualGP.update` |
| fantasies | q · t(f(X)), in function space | `DualGP.condition` |
| unlearning | q − tᵢ | `Posterior.remove`, `DualGP.forget`, `NetworkPosterior.forget` |
| leave-one-out, leave-group-out, wrong labels | p(yᵢ ∣ q − tᵢ) | `leave_one_out`, `leave_group_out`, `mislabelled` |
| which label to ask for | q · t̄(f(x)), of the precision that the site will have | `active.select`, `active.PoolLoop` |
| leverage; sensitivity | tr BᵢVᵢ; −Vᵢ(I − BᵢVᵢ)⁻¹αᵢ | `leverage`, `sensitivity`, `perturb` |
| moving Z; changing hyperparameters | pull back | `Posterior.rebase` |
| variational training | q minimises λE_q[loss] + KL; read out as prior + t | `optim.IVON` and its relatives |
| yesterday's posterior as today's prior, on weights | prior ← q | `WeightPosterior.as_prior` |
| tempering; forgetting | prior + t/T; prior + t^f | `Posterior.temper`, `Posterior.scale`, `DualGP.fade` |
| models merged; one taken out | prior + Σ α_k t_k; − t_k | `merge`, `transfer.forget` |
| federated rounds | t_k ← t_k^{1−ρ} t_new^ρ under q − t_k | `transfer.FederatedServer` |
| EWC; K-prior; replay | −log t; t re-expanded on memory; the loss | `transfer.quadratic`, `KPrior`, `replay` |
| PAC-Bayes certificate | KL(q ‖ prior) and the Gibbs risk | `transfer.certify` |
| evidence lower bound | Σ E_q[log p] − KL(q ‖ prior) | `DualGP.elbo`, `Posterior.kl` |
"""

from dualgp import _quiet as _quiet  # first
from dualgp import active, errors, likelihoods, optim, transfer
from dualgp._version import __version__ as __version__
from dualgp.basis import InducingBasis
from dualgp.duals import DualParameters, dual_parameters, expected_log_prob
from dualgp.gp.condition import Conditioned
from dualgp.gp.exact import BoundGradient, ExactGP, ExactResult
from dualgp.gp.fit import FitResult
from dualgp.gp.memory import Memory
from dualgp.gp.model import DualGP
from dualgp.gp.stream import UpdateResult
from dualgp.inducing import greedy_variance
from dualgp.influence import (
    DiagonalPosterior,
    LeftOut,
    Ranking,
    Sensitivity,
    leave_group_out,
    leave_one_out,
    leverage,
    leverage_by_class,
    mislabelled,
    perturb,
    preconditioner_variance,
    sensitivity,
    sum_by,
    validation_influence,
)
from dualgp.jacobian import JacobianBasis
from dualgp.kernels import LazyKernel, keops_status
from dualgp.laplace import laplace_sites
from dualgp.nets.convert import from_weight_decay, network_gp
from dualgp.nets.posterior import NetworkPosterior
from dualgp.posterior import Posterior
from dualgp.predictive import log_predictive, predictive_distribution
from dualgp.selection import Candidates
from dualgp.sites import Site, Sites, WeightSite
from dualgp.transfer import merge
from dualgp.weights import WeightLayout, WeightPosterior

__all__ = [
    "BoundGradient",
    "Candidates",
    "Conditioned",
    "DiagonalPosterior",
    "DualGP",
    "DualParameters",
    "ExactGP",
    "ExactResult",
    "FitResult",
    "InducingBasis",
    "JacobianBasis",
    "LazyKernel",
    "LeftOut",
    "Memory",
    "NetworkPosterior",
    "Posterior",
    "Ranking",
    "Sensitivity",
    "Site",
    "Sites",
    "UpdateResult",
    "WeightLayout",
    "WeightPosterior",
    "WeightSite",
    "active",
    "dual_parameters",
    "errors",
    "expected_log_prob",
    "from_weight_decay",
    "greedy_variance",
    "keops_status",
    "laplace_sites",
    "leave_group_out",
    "leave_one_out",
    "leverage",
    "leverage_by_class",
    "likelihoods",
    "log_predictive",
    "merge",
    "mislabelled",
    "network_gp",
    "optim",
    "perturb",
    "preconditioner_variance",
    "predictive_distribution",
    "sensitivity",
    "sum_by",
    "transfer",
    "validation_influence",
]
