"""
A training run that ends with a posterior
=========================================

IVON takes AdamW's place in two lines. What it ends with is a Gaussian over the weights, and
networks drawn from it disagree on what the data do not settle. Claims, each asserted, on
300 images of digits: IVON's negative log-likelihood is below that of AdamW at its usual
settings, and of the test images on which its networks disagree most it gets many more wrong
than of the rest. Not claimed: better calibration. IVON is too cautious about what it gets
right, and AdamW nearer to the diagonal here.
"""

import os

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.distributions import Categorical

import dualgp
from dualgp.plotting import BLUE, VERMILION, plot_images, plot_reliability

torch.set_num_threads(1)
EPOCHS, BATCH, SAMPLES = (60 if "SMOKE" in os.environ else 100), 20, 32
X, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
X = X.float() / 16
train_rows, test_rows = torch.randperm(
    len(X), generator=torch.Generator().manual_seed(0)
).split([300, len(X) - 300])
steps = EPOCHS * (len(train_rows) // BATCH)


# %%
# Train by AdamW, and by IVON: two lines differ, the optimiser and the draw of the weights.
def train(make) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    optimizer = make(net)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for batch in train_rows[torch.randperm(len(train_rows))].split(BATCH):
            optimizer.zero_grad()
            with (
                optimizer.sampled_params()
                if isinstance(optimizer, dualgp.optim.IVON)
                else torch.enable_grad()
            ):
                nn.functional.cross_entropy(net(X[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return net, optimizer


plain, _ = train(lambda net: torch.optim.AdamW(net.parameters(), lr=1e-3))
net, optimizer = train(
    lambda net: dualgp.optim.IVON(
        net.named_parameters(), num_data=300, total_steps=steps, curvature_horizon=1
    )
)

# %%
# The posterior is a value; networks are drawn from it.
q = optimizer.posterior()
p_ivon = q.predict_samples(
    net, X[test_rows], SAMPLES, generator=torch.Generator().manual_seed(0)
).softmax(-1)
p_adamw = plain(X[test_rows]).softmax(-1).detach()
spread = p_ivon.std(0).amax(-1)  # how far the networks disagree
p_ivon = p_ivon.mean(0)
nll = [-p.gather(-1, y[test_rows, None]).log().mean().item() for p in (p_adamw, p_ivon)]
answer = y[test_rows]
wrong = p_ivon.argmax(-1) != answer
most = spread.argsort(descending=True)
unsure, sure = (
    wrong[most[:150]].float().mean().item(),
    wrong[most[150:]].float().mean().item(),
)
print(f"NLL: AdamW {nll[0]:.3f}, IVON {nll[1]:.3f}")
sure_and_wrong = [
    (p.amax(-1)[p.argmax(-1) != answer] > 0.9).float().mean().item()
    for p in (p_adamw, p_ivon)
]
print(
    f"of its mistakes AdamW makes {sure_and_wrong[0]:.0%} at more than 90 %, "
    f"IVON {sure_and_wrong[1]:.0%}"
)
print(
    f"wrong: {100 * unsure:.1f} % of the 150 images of most disagreement, "
    f"{100 * sure:.1f} % of the others"
)
assert nll[1] < nll[0] - 0.01
assert unsure > 5 * sure

# %%
# Left: below the diagonal is too sure, above it too little. Middle: mistakes that are left
# where the least certain images are put aside. Right: images on which the networks disagree
# most, with their labels and those's probabilities.
fig = plt.figure(figsize=(14, 4.4), layout="constrained")
parts = fig.subfigures(1, 2, width_ratios=(1.2, 1))
left, middle = parts[0].subplots(1, 2)
right = parts[1].subplots()
order = {
    "AdamW": p_adamw.amax(-1).argsort(descending=True),
    "IVON, 32 draws": spread.argsort(),
}  # most certain first
count = torch.arange(1, len(answer) + 1)
for (label, rows), p, color in zip(
    order.items(), (p_adamw, p_ivon), (VERMILION, BLUE), strict=True
):
    plot_reliability(left, Categorical(probs=p), answer, color=color, label=label)
    mistakes = (p.argmax(-1) != answer)[rows].cumsum(0) / count
    middle.plot(100 * count / len(count), 100 * mistakes, color=color, label=label)
left.set(
    xlabel="confidence of the prediction",
    ylabel="share that was right",
    title="reliability",
    xlim=(0.5, 1.02),
    ylim=(0.5, 1.02),
)
middle.set(
    xlabel="images kept (%), most certain first",
    ylabel="mistakes among them (%)",
    title="what doubt is worth",
)
top = most[:12]
labels = [
    f"{a}: {100 * q:.0f} %"
    for a, q in zip(answer[top].tolist(), p_ivon[top, answer[top]].tolist(), strict=True)
]
plot_images(right, X[test_rows[top]].reshape(-1, 8, 8), labels=labels, marked=wrong[top])
right.set_title("most disagreement (vermilion: wrong)")
for ax in (left, middle):
    ax.legend(loc="upper left")
os.makedirs(folder := os.environ.get("FIGURES", "figures"), exist_ok=True)
fig.savefig(f"{folder}/07_variational_training.png", dpi=150)
