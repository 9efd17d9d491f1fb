"""Every Python block of the README and of docs/ runs as printed, and their links lead somewhere.

A page is one namespace, its blocks run in order. What a page supposes that its reader has, `GIVEN` gives it; pages to
start from and to follow suppose nothing. A block under `<!-- not run: reason -->` is not run, and is counted here. One
that begins with a torchrun command in a comment is run by that command, from a file of the name that it says.
"""

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

import dualgp  # noqa: F401 - which takes a while, and is not to count for the first page

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += sorted(ROOT.glob("docs/how_to/*.md"))

BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)? *```python\n(?P<code>.*?)^ *```$", re.M | re.S)
LOOKS_LIKE_ONE = re.compile(r"^ *(```+|~~~+|:::+) *(\{(code(-block)?|python|jupyter\S*)\} *)?py", re.M)
TORCHRUN = re.compile(r"# (?P<file>\w+\.py):  torchrun (?P<options>.+) (?P=file)$", re.M)

# How many blocks of a page are not run; the reasons stand in the pages.
NOT_RUN = {
    "docs/distributed.md": 2,
    "docs/networks.md": 1,
    "docs/how_to/distribute.md": 2,
    "docs/how_to/from_ivon.md": 1,
    "docs/how_to/from_laplace.md": 1,
}

BASICS = """
import dualgp, gpytorch, torch

def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def regression(n=120, seed=0):
    x = draw(n, 2, seed=seed)
    return x, x[:, 0].sin() + 0.1 * draw(n, seed=seed + 1)

kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
likelihood = gpytorch.likelihoods.GaussianLikelihood()
X, y = regression()
X_new, y_new = regression(20, seed=2)
X_test, y_test = regression(30, seed=4)
"""

NETWORK = (
    BASICS
    + """
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
loader = DataLoader(TensorDataset(X, y), batch_size=40)
"""
)

GIVEN = {
    "README.md": NETWORK,
    "CONTRIBUTING.md": "import torch\neye, phi, beta = torch.eye(2), torch.ones(3, 2), torch.ones(3)",
    "docs/botorch.md": BASICS
    + """
from botorch.models.transforms import Normalize, Standardize

kernel, likelihood, d = kernel.double(), likelihood.double(), 2
X, y = X[:20].double(), y[:20].double()
Y, labels, bounds = y.unsqueeze(-1), (y > 0).double(), torch.tensor([[-2.0, -2.0], [2.0, 2.0]]).double()
gp = dualgp.DualGP(kernel, likelihood, num_inducing=15)
""",
    "docs/distributed.md": BASICS
    + """
torch.save(regression(600), folder / "flights.pt")
""",
    "docs/fitting.md": BASICS
    + """
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, SoftmaxLikelihood

dataset = torch.utils.data.TensorDataset(X, y)
""",
    "docs/index.md": NETWORK,
    "docs/large.md": BASICS
    + """
X, Z = X[:80].double(), X[80:].double()
y = (y[:80] > 0).double()
v, beta, A = torch.ones(80, 1).double(), torch.ones(80).double(), torch.eye(40).double()
X_test = X_test.double()
""",
    "docs/leaving_out.md": BASICS
    + """
gp = dualgp.DualGP(kernel, likelihood, num_inducing=10)
gp.fit(X, y)
q, sites = gp.posterior, gp.sites
""",
    "docs/networks.md": NETWORK
    + """
x, X_val, y_val, X_old, y_old = X_test, X_test, y_test, X[:5], y[:5]
""",
    "docs/optimisers.md": NETWORK
    + """
N, M, T = 120, 120, 9
loss_fn = lambda f, y: nn.functional.mse_loss(f.squeeze(-1), y)
run = dualgp.optim.IVON(net.named_parameters(), num_data=N, total_steps=T)
other = run.posterior()
""",
    "docs/plotting.md": BASICS
    + """
X = X[:, :1].contiguous()
line = torch.linspace(-2, 2, 50).unsqueeze(-1)
gp = dualgp.DualGP(kernel, likelihood, num_inducing=10)
gp.fit(X, y)
""",
    "docs/selection.md": BASICS
    + """
X_pool, labels = X[:60], (y[:60] > 0).float()
gp = dualgp.DualGP(kernel, gpytorch.likelihoods.BernoulliLikelihood(), num_inducing=10)
first, label = torch.arange(10), lambda ids: labels[ids]
y_first = label(first)
""",
    "docs/sharp_bits.md": BASICS
    + """
gp = dualgp.DualGP(kernel, likelihood, num_inducing=10)
gp.fit(X, y)
new_kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
basis = dualgp.InducingBasis(new_kernel, gp.inducing_points)
""",
    "docs/streaming.md": BASICS
    + """
import matplotlib.pyplot as plt

X, y = X[:, :1].contiguous(), X[:, 0].sin()
batches, x = list(zip(X.split(40), y.split(40))), torch.linspace(-2, 2, 20).unsqueeze(-1)
X2, y2 = draw(60, 2), (draw(60, 2)[:, 0] > 0).float()
other = dualgp.DualGP(gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.BernoulliLikelihood(), num_inducing=10)
other.update(X2, y2)
ax = plt.figure().add_subplot()
""",
    "docs/transfer.md": NETWORK
    + """
X = draw(160, 2)
y = (X @ draw(2, 3)).argmax(-1)
likelihood = gpytorch.likelihoods.SoftmaxLikelihood(num_classes=3, mixing_weights=False)
base_network, network = (nn.Linear(2, 3) for _ in range(2))
fine_tuned_networks = [(network, (X, y))]
prior = dualgp.WeightPosterior(dualgp.WeightLayout.of(network), prior_precision=1.0)
q_first, q, losses = prior, prior, torch.rand(20, 10)
X_memory, X_new, y_new = X[:20], X[100:], y[100:]
curvature_of_the_rest = None
""",
}


class Block(NamedTuple):
    """Code of a page, the line before it, and why it is not run, if so."""

    code: str
    line: int
    reason: str | None


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        found.append(Block(textwrap.dedent(match["code"]), line, match["reason"]))
    return found


def is_script(block: Block) -> bool:
    return TORCHRUN.match(block.code) is not None


RUN = {page: [b for b in blocks_of(page) if b.reason is None] for page in PAGES}
IN_PROCESS = [page for page in PAGES if any(not is_script(b) for b in RUN[page])]
SCRIPTS = [(page, b) for page in PAGES for b in RUN[page] if is_script(b)]


def marked(page: Path):
    marks = []
    if page.stem == "botorch":  # which draws from the posterior at candidates that lie all but together
        marks.append(pytest.mark.filterwarnings("ignore:A not p.d., added jitter"))
    return pytest.param(page, id=name_of(page), marks=marks)


@pytest.mark.parametrize("page", [marked(page) for page in IN_PROCESS])
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    if page.name == "botorch.md":
        pytest.importorskip("botorch", reason="BoTorch is not installed")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    exec(GIVEN.get(name_of(page), ""), names)
    for block in RUN[page]:
        if not is_script(block):
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("page", "block"), [pytest.param(p, b, id=f"{name_of(p)}:{b.line}") for p, b in SCRIPTS])
def test_scripts_run_by_the_command_that_they_begin_with(page, block, tmp_path):
    exec(GIVEN.get(name_of(page), ""), {"folder": tmp_path})
    command = TORCHRUN.match(block.code)
    assert command is not None
    (tmp_path / command["file"]).write_text(block.code, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", *command["options"].split(), command["file"]]
    process = subprocess.Popen(torchrun, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, errors = process.communicate()
    finally:  # with its workers, should it hang
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    assert process.returncode == 0, errors


def test_no_block_escapes():
    counted = {name_of(page): sum(b.reason is not None for b in blocks_of(page)) for page in PAGES}
    assert {name: n for name, n in counted.items() if n} == NOT_RUN
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(LOOKS_LIKE_ONE.findall(text)) == len(blocks_of(page)), f"{name_of(page)}: a block is not ```python"
    assert set(GIVEN) <= {name_of(page) for page in PAGES}


def test_code_on_pages_is_read_without_scrolling():
    lines = [
        (name_of(p), line) for p in PAGES if "docs" in p.parts for b in blocks_of(p) for line in b.code.splitlines()
    ]
    assert not [(page, line) for page, line in lines if len(line) > 92]


LINK = re.compile(r"(?<!!)\[[^\]\n]+\]\((?!\w+:)(?P<path>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")
NAMED = re.compile(r"`(?!docs/_build|examples/NN)(?P<path>(?:benchmarks|docs|dualgp|examples|tests)/[\w/]+\.\w+)`")


def anchors_of(text: str) -> set[str]:
    """What GitHub makes of headings: lower case, punctuation gone, a hyphen for a space."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S), re.M)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page)) for page in [*PAGES, ROOT / "CHANGELOG.md"]])
def test_links_and_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in LINK.finditer(re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)):
        target = page.parent / link["path"] if link["path"] else page
        assert target.exists(), f"{name_of(page)} links to {link['path']}, which is not there"
        if link["anchor"]:
            assert link["anchor"] in anchors_of(target.read_text(encoding="utf-8")), f"no heading for {link[0]}"
    missing = [match["path"] for match in NAMED.finditer(text) if not (ROOT / match["path"]).exists()]
    assert not missing, f"{name_of(page)} names files that are not there"
