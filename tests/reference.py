"""What the library is held to: dense, slow, obvious, float64, plain torch. Nothing here imports dualgp."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

LOG_2PI = math.log(2 * math.pi)


def distance(x: Tensor, z: Tensor, lengthscale: float | Tensor) -> Tensor:
    """|x − z| / ℓ for every pair, without the expansion of the square."""
    return ((x.unsqueeze(-2) - z.unsqueeze(-3)) / lengthscale).square().sum(-1).sqrt()


def rbf(x: Tensor, z: Tensor, lengthscale: float | Tensor, variance: float) -> Tensor:
    return variance * (-0.5 * distance(x, z, lengthscale).square()).exp()


def matern52(x: Tensor, z: Tensor, lengthscale: float | Tensor, variance: float) -> Tensor:
    a = 5.0**0.5 * distance(x, z, lengthscale)
    return variance * (1 + a + a.square() / 3) * (-a).exp()


def smooth_matern52(x: Tensor, z: Tensor, lengthscale: float | Tensor, variance: float | Tensor) -> Tensor:
    """The same with a distance that autograd can differentiate where x = z."""
    square = ((x.unsqueeze(-2) - z.unsqueeze(-3)) / lengthscale).square().sum(-1)
    a = (5.0 * square + 1e-30).sqrt()
    return variance * (1 + a + a.square() / 3) * (-a).exp()


def log_normal(y: Tensor, mean: Tensor, cov: Tensor) -> float:
    return MultivariateNormal(mean, cov).log_prob(y).item()


def gpr(K: Tensor, Ks: Tensor, kss: Tensor, y: Tensor, noise: Tensor) -> tuple[float, Tensor, Tensor]:
    """Log marginal likelihood of exact regression; mean and variance at test inputs (Ks = k(X, X*))."""
    cov = K + torch.diag_embed(noise.expand(y.shape))
    weights = torch.linalg.solve(cov, Ks)
    return log_normal(y, torch.zeros_like(y), cov), weights.T @ y, kss - (Ks * weights).sum(0)


def sgpr_bound(Kzz: Tensor, Kzx: Tensor, kxx: Tensor, y: Tensor, noise: Tensor) -> float:
    """Titsias 2009: log N(y | 0, Q + Σ) − ½ tr Σ⁻¹(K − Q), Q = K_xz K_zz⁻¹ K_zx; noise [n] may differ per datum."""
    Q = Kzx.T @ torch.linalg.solve(Kzz, Kzx)
    noise = noise.expand(y.shape)
    return log_normal(y, torch.zeros_like(y), Q + noise.diag()) - 0.5 * ((kxx - Q.diagonal()) / noise).sum().item()


def textbook_q(Kzz: Tensor, Kzx: Tensor, lam: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """q(u) = N(m, S) of centred u, not whitened: S = K(K + B_u)⁻¹K and m = K(K + B_u)⁻¹α_u, with k-space sums."""
    alpha_u, B_u = Kzx @ lam, (Kzx * beta) @ Kzx.T
    S = Kzz @ torch.linalg.solve(Kzz + B_u, Kzz)
    return Kzz @ torch.linalg.solve(Kzz + B_u, alpha_u), 0.5 * (S + S.T)


def textbook_marginals(Kzz: Tensor, Kzx: Tensor, kxx: Tensor, m: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of f(x) − μ(x) under q(u) = N(m, S)."""
    a = torch.linalg.solve(Kzz, Kzx)
    return a.T @ m, kxx - (Kzx * a).sum(0) + (a * (S @ a)).sum(0)


def textbook_kl(Kzz: Tensor, m: Tensor, S: Tensor) -> float:
    return kl_divergence(MultivariateNormal(m, S), MultivariateNormal(torch.zeros_like(m), Kzz)).item()


def brute(g: Callable[[Tensor], Tensor], mean: Tensor, var: Tensor, points: int = 4001, width: float = 11.0) -> Tensor:
    """E[g(f)] elementwise for f ~ N(mean, var), by the trapezoid rule on `points` points over ± `width` deviations.

    g is given f of shape [points, *mean.shape].
    """
    t = torch.linspace(-width, width, points, dtype=torch.float64)
    weight = (-0.5 * t.square()).exp()
    weight = (weight / weight.sum()).reshape(-1, *[1] * mean.ndim)
    return (weight * g(mean + var.sqrt() * t.reshape(weight.shape))).sum(0)


def brute_joint(g: Callable[[Tensor], Tensor], mean: Tensor, var: Tensor, points: int = 121) -> Tensor:
    """E[g(f)] for one datum with f ~ N(mean [C], diag var [C]), by a trapezoid rule on a grid of points^C."""
    t = torch.linspace(-8.0, 8.0, points, dtype=torch.float64)
    grid = torch.cartesian_prod(*[t] * len(mean)).reshape(-1, len(mean))
    weight = (-0.5 * grid.square().sum(-1)).exp()
    values = g(mean + var.sqrt() * grid)
    return (weight.reshape(-1, *[1] * (values.ndim - 1)) * values).sum(0) / weight.sum()


def numerical(f: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-4) -> Tensor:
    """Elementwise derivative of an elementwise f, by central differences of fourth order."""
    return (8 * (f(at + step) - f(at - step)) - (f(at + 2 * step) - f(at - 2 * step))) / (12 * step)


def gradient(f: Callable[[Tensor], float], at: Tensor, step: float = 1e-5) -> Tensor:
    """Gradient of a scalar f at a vector, one entry at a time, by central differences of fourth order."""
    out = torch.zeros_like(at)
    for i in range(at.numel()):
        d = torch.zeros_like(at)
        d.view(-1)[i] = step
        out.view(-1)[i] = (8 * (f(at + d) - f(at - d)) - (f(at + 2 * d) - f(at - 2 * d))) / (12 * step)
    return out


def pivoted_cholesky(K: Tensor, count: int) -> list[int]:
    """Rows by greatest conditional variance, from the whole matrix: condition on each pivot in turn."""
    K, chosen = K.clone(), []
    for _ in range(count):
        i = int(K.diagonal().argmax())
        chosen.append(i)
        K = K - torch.outer(K[i], K[i]) / K[i, i]
    return chosen


def glm_covariance(J: Tensor, B: Tensor, tau: float | Tensor, at: Tensor) -> Tensor:
    """J(x)(G + diag τ)⁻¹J(x')ᵀ with G = Σ JᵢᵀBᵢJᵢ, [n, C, n, C]: Laplace in weight space. J [N, C, P], at [n, C, P]."""
    G = torch.einsum("ncp,ncd,ndq->pq", J, B, J)
    P = G + torch.diag(torch.as_tensor(tau, dtype=G.dtype).expand(len(G)))
    return torch.einsum("ncp,pq,mdq->ncmd", at, torch.linalg.inv(P), at)


def dual_covariance(J: Tensor, R: Tensor, tau: float, at: Tensor) -> Tensor:
    """κ − κ(x, X)R(I + RᵀKR)⁻¹Rᵀκ(X, x'), [n, C, n, C]: the same in the space of NC function values, RRᵀ = B."""
    J, x = (torch.einsum("ncd,ncp->ndp", R, J).flatten(0, 1), at.flatten(0, 1))
    K = torch.eye(len(J), dtype=J.dtype) + J @ J.T / tau
    V = x @ x.T / tau - x @ J.T @ torch.linalg.solve(K, J @ x.T) / tau**2
    return V.reshape(*at.shape[:2], *at.shape[:2])


def projected_covariance(J: Tensor, B: Tensor, tau: float, at: Tensor, J_Z: Tensor) -> Tensor:
    """J[(I − ΦΦᵀ)/τ + Φ(ΦᵀGΦ + τI)⁻¹Φᵀ]Jᵀ, Φ an orthonormal basis of the row space of J_Z: what Z lets data change."""
    _, s, Vh = torch.linalg.svd(J_Z.flatten(0, 1), full_matrices=False)
    Phi = Vh[s.square() > 1e-7 * s[0].square()].T
    inside = glm_covariance(J @ Phi, B, tau, at @ Phi)
    rest = at - at @ Phi @ Phi.T
    return inside + torch.einsum("ncp,mdp->ncmd", rest, rest) / tau


def projected_map(
    J: Tensor, B: Tensor, alpha: Tensor, theta: Tensor, tau: float, at: Tensor, J_Z: Tensor
) -> tuple[Tensor, float]:
    """Under θ ~ N(0, τ⁻¹I), of which data are told through what J_Z spans only: θ̂ moves f(x) and log Z by so much.

    Datum i sees f_i + J_iΦΦᵀθ − J_iθ*; a prediction at x is f(x) + J(x)(θ̂ − θ*), with the whole of J(x).
    """
    _, s, Vh = torch.linalg.svd(J_Z.flatten(0, 1), full_matrices=False)
    Phi = Vh[s.square() > 1e-7 * s[0].square()].T
    seen, offset = J @ Phi @ Phi.T, J @ theta
    P = tau * torch.eye(len(theta), dtype=J.dtype) + torch.einsum("ncp,ncd,ndq->pq", seen, B, seen)
    b = torch.einsum("ncp,nc->p", seen, alpha + torch.einsum("ncd,nd->nc", B, offset))
    gain = -(alpha * offset).sum() - 0.5 * torch.einsum("nc,ncd,nd->", offset, B, offset)
    gain = gain - 0.5 * torch.logdet(P / tau) + 0.5 * b @ torch.linalg.solve(P, b)
    return at @ (torch.linalg.solve(P, b) - theta), float(gain)
