"""What all tests share: shape checks, devices and the data sets that are not shipped."""

import os

os.environ.setdefault("KEOPS_VERBOSE", "0")  # before anything imports pykeops
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

mpl.use("Agg")

# Every shape and type in a signature of dualgp is checked under pytest, and only there.
# The hook acts on modules that are imported after it.
install_import_hook("dualgp", "beartype.beartype")

# Thousands of small products: on shared cores a pool of threads makes them ten times slower, not faster.
# `pytest -n 2` uses a second core.
torch.set_num_threads(1)

# A first call may compile or warm up, so a deadline per example says nothing. Under CI the
# examples are the same in every run.
settings.register_profile("dualgp", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("dualgp")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - for libraries that draw from the global state


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn; skips where there is no such device."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def load_shared() -> Callable[[str], tuple[torch.Tensor, torch.Tensor]]:
    """``load_shared(name)``: X [N, D] and y [N] in float64 of a data set that is not shipped.

    Reads ``name.csv`` or ``name.csv.gz`` (header, comma separated, target last) in the folder
    that the environment variable DUALGP_DATA names, and skips the test where it is absent.
    """

    def load(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        path = _shared_path(f"{name}.csv", f"{name}.csv.gz")
        table = torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2))
        return table[:, :-1].contiguous(), table[:, -1].contiguous()

    return load


@pytest.fixture(scope="session")
def load_shared_npz() -> Callable[[str], dict[str, np.ndarray]]:
    """``load_shared_npz(name)``: the arrays of ``name.npz``, found as by ``load_shared``."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(_shared_path(f"{name}.npz")) as arrays:
            return dict(arrays)

    return load


def _shared_path(*names: str) -> Path:
    """The first of the named files that exists in $DUALGP_DATA; skips the test if none does."""
    folder = os.environ.get("DUALGP_DATA")
    if not folder:
        pytest.skip("DUALGP_DATA names no folder of data sets")
    for name in names:
        if (path := Path(folder) / name).is_file():
            return path
    pytest.skip(f"no {' or '.join(names)} in DUALGP_DATA={folder}")
