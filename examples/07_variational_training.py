"""
A training run that ends with a posterior
=========================================

IVON takes AdamW's place in two lines. What it ends with is a Gaussian over the weights, and networks drawn from it
disagree on what the data do not settle. Claims, each asserted, on 300 images of digits: IVON's negative log-likelihood
is below that of AdamW at its usual settings, and of the test images on which its networks disagree most it gets many
more wrong than of the rest.
"""

import os

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import dualgp
from dualgp.plotting import BLUE, VERMILION

torch.set_num_threads(1)
EPOCHS, BATCH, SAMPLES = (60 if "SMOKE" in os.environ else 100), 20, 32
X, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
X = X.float() / 16
train_rows, test_rows = torch.randperm(len(X), generator=torch.Generator().manual_seed(0)).split([300, len(X) - 300])
steps = EPOCHS * (len(train_rows) // BATCH)


# %%
# Train by AdamW, and by IVON: two lines differ, the optimiser and the draw of the weights.
def train(make) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = make(net)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for batch in train_rows[torch.randperm(len(train_rows))].split(BATCH):
            optimizer.zero_grad()
            with optimizer.sampled_params() if isinstance(optimizer, dualgp.optim.IVON) else torch.enable_grad():
                nn.functional.cross_entropy(net(X[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return net, optimizer


plain, _ = train(lambda net: torch.optim.AdamW(net.parameters(), lr=1e-3))
net, optimizer = train(
    lambda net: dualgp.optim.IVON(net.named_parameters(), num_data=300, total_steps=steps, curvature_horizon=1)
)

# %%
# The posterior is a value; networks are drawn from it.
q = optimizer.posterior()
p_ivon = q.predict_samples(net, X[test_rows], SAMPLES, generator=torch.Generator().manual_seed(0)).softmax(-1)
p_adamw = plain(X[test_rows]).softmax(-1).detach()
spread = p_ivon.std(0).amax(-1)  # how far the networks disagree
p_ivon = p_ivon.mean(0)
nll = [-p.gather(-1, y[test_rows, None]).log().mean().item() for p in (p_adamw, p_ivon)]
wrong = p_ivon.argmax(-1) != y[test_rows]
most = spread.argsort(descending=True)
unsure, sure = wrong[most[:150]].float().mean().item(), wrong[most[150:]].float().mean().item()
print(f"NLL: AdamW {nll[0]:.3f}, IVON {nll[1]:.3f}")
print(f"wrong: {100 * unsure:.1f} % of the 150 images of most disagreement, {100 * sure:.1f} % of the others")

# %%
fig = plt.figure(figsize=(9, 3.4), layout="constrained")
left, right = fig.subfigures(1, 2, width_ratios=[1, 1.2])
ax = left.subplots()
for p, colour, label in ((p_adamw, VERMILION, "AdamW"), (p_ivon, BLUE, "IVON, 32 draws")):
    loss = (-p.gather(-1, y[test_rows, None]).log()).squeeze(-1).sort(descending=True).values
    ax.semilogx(range(1, len(loss) + 1), loss, color=colour, label=label)
ax.set(xlabel="test image, by its loss", ylabel="negative log-likelihood [nats]")
ax.legend()
for ax, i in zip(right.subplots(2, 6).flat, most[:12].tolist(), strict=True):
    ax.imshow(1 - X[test_rows[i]].reshape(8, 8), cmap="gray")
    ax.set_title(f"{int(y[test_rows[i]])}: {100 * p_ivon[i, y[test_rows[i]]]:.0f} %", fontsize=8)
    ax.axis("off")
right.suptitle("most disagreement (label: its probability)", fontsize=9)
assert nll[1] < nll[0]
assert unsure > 5 * sure
