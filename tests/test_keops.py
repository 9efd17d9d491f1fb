"""KeOps is tried and judged before it is used; where it does not compile all goes on without it, and says why."""

import pytest
import torch
from gpytorch.kernels import (
    Kernel,
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    PolynomialKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)

from dualgp import LazyKernel, errors, keops_status
from dualgp.kernels import choice, keops
from dualgp.kernels.cuda import cuda_shim


@pytest.fixture
def compiled() -> None:
    """Skips where KeOps does not compile, saying why."""
    status = keops_status()
    if not status.available:
        pytest.skip(str(status))


@pytest.fixture
def fresh():
    """Without what was found out before."""
    keops._status.cache_clear()
    choice._measured.clear()
    yield
    keops._status.cache_clear()
    choice._measured.clear()


def draw(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.detach().double() - expected.detach()).norm() / expected.detach().norm()).item()


@pytest.mark.timeout(900)
def test_a_product_by_keops_is_the_chunked_one(compiled, capfd):
    """The formula of the trial: compiled once, 5 s where nothing else runs."""
    kernel, x, v = RBFKernel(), draw(50, 2, dtype=torch.float32), draw(50, 2, seed=1, dtype=torch.float32)
    found = LazyKernel(kernel, x, backend="keops") @ v
    assert str(LazyKernel(kernel, x, backend="keops").backend()) == "keops: asked for"
    assert relative(found, (LazyKernel(kernel.double(), x.double()) @ v.double())) < 1e-6
    assert capfd.readouterr().out == ""


KERNELS = {
    "matern 1/2": lambda: MaternKernel(nu=0.5, ard_num_dims=2),
    "matern 5/2": lambda: ScaleKernel(MaternKernel(nu=2.5)),
    "periodic and rq": lambda: ScaleKernel(PeriodicKernel() * RQKernel(active_dims=[0])),
    "sum": lambda: ScaleKernel(RBFKernel()) + LinearKernel() + MaternKernel(nu=1.5),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", KERNELS)
def test_products_and_gradients_by_keops_are_the_chunked_ones(compiled, name):
    kernel = KERNELS[name]().double()
    x, z = draw(40, 2).requires_grad_(), draw(30, 2, seed=1).requires_grad_()
    v, g = draw(30, 1, seed=2).requires_grad_(), draw(40, 1, seed=3)
    wanted = [x, z, v, *kernel.parameters()]
    found, expected = (LazyKernel(kernel, x, z, backend=b) @ v for b in ("keops", "chunked"))
    assert relative(found, expected) < 1e-12
    mine, theirs = (torch.autograd.grad((out * g).sum(), wanted) for out in (found, expected))
    for a, b in zip(mine, theirs, strict=True):
        assert relative(a, b) < 1e-10


def test_without_the_package_products_are_chunked_and_say_once_why(fresh, monkeypatch):
    monkeypatch.setattr(keops.importlib.util, "find_spec", lambda name: None)
    kernel, x = RBFKernel(), draw(5, 2)
    with pytest.warns(errors.BackendWarning, match="chunked: KeOps is not available: pykeops is not installed: pip"):
        found = LazyKernel(kernel, x, backend="keops") @ torch.ones(5, dtype=torch.float64)
    assert torch.equal(found, LazyKernel(kernel, x) @ torch.ones(5, dtype=torch.float64))
    assert "pip install 'dualgp[keops]'" in str(keops_status())


@pytest.mark.parametrize(
    ("trial", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the trial was ended by signal 11"),
        ("raise ModuleNotFoundError('pykeops_cpp_123')", "ModuleNotFoundError: pykeops_cpp_123"),
        ("import sys; sys.exit('a KeOps product is wrong')", "a KeOps product is wrong"),
        ("import time; time.sleep(60)", "the trial did not end: TimeoutExpired"),
        ("import sys; sys.exit(3)", "the trial ended with status 3"),
    ],
)
def test_a_trial_that_fails_or_crashes_is_survived(fresh, monkeypatch, trial, reason):
    monkeypatch.setattr(keops.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(keops, "_TRIAL", trial)
    monkeypatch.setattr(keops, "_TIMEOUT", 10 if "sleep" not in trial else 1)
    assert keops_status() == keops.KeopsStatus(False, reason)
    monkeypatch.setattr(keops, "_TRIAL", "")  # found out once
    assert not keops_status().available


def test_a_silent_fall_back_on_a_cuda_machine_is_told_with_the_remedy(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(keops.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(keops, "_TRIAL", "import os, sys; sys.exit(None if 'CUDA_PATH' in os.environ else 'fell back')")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    toolkit(tmp_path)
    monkeypatch.setattr(keops, "cuda_shim", lambda: cuda_shim(tmp_path / "shim", [str(tmp_path / "nvidia")]))
    status = keops_status("cuda")
    assert not status.available
    assert (
        f"fell back. It works if Python is started with CUDA_PATH={tmp_path / 'shim'} LD_LIBRARY_PATH=" in status.reason
    )
    keops._status.cache_clear()
    (tmp_path / "nvidia/runtime/lib/libcuda.so.1").unlink()
    assert "fell back; not found on this machine: libcuda.so" in keops_status("cuda").reason


def toolkit(home) -> None:
    """CUDA as pip installs it: versioned names, headers in two places, stubs that are no libraries."""
    files = ["nvrtc/lib/libnvrtc.so.13", "nvrtc/lib/libnvrtc-builtins.so.13.0", "runtime/lib/libcudart.so.13"]
    files += ["runtime/lib/stubs/libcuda.so", "runtime/lib/libcuda.so.1", "runtime/include/cuda.h"]
    files += ["runtime/include/cuda_fp16.h", "nvrtc/include/nvrtc.h"]
    for name in files:
        path = home / "nvidia" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def test_the_shim_has_plain_names_builtins_and_all_headers_in_one_place(tmp_path):
    toolkit(tmp_path)
    shim = cuda_shim(tmp_path / "shim", [str(tmp_path / "nvidia")])
    assert shim.missing == []
    read = {p.name: p.read_text() for part in ("lib", "include") for p in (tmp_path / "shim" / part).iterdir()}
    assert read["libcuda.so"] == "runtime/lib/libcuda.so.1"  # the stub is passed over
    assert read["libnvrtc.so"] == "nvrtc/lib/libnvrtc.so.13"
    assert {"libnvrtc-builtins.so.13.0", "libcudart.so", "cuda.h", "nvrtc.h", "cuda_fp16.h"} <= read.keys()
    assert shim.environment["LD_LIBRARY_PATH"].split(":")[0] == str(tmp_path / "shim/lib")
    again = cuda_shim(tmp_path / "shim", [str(tmp_path / "nvidia")])  # nothing is in the way of a second time
    assert again.environment == shim.environment
    assert cuda_shim(tmp_path / "none", [str(tmp_path / "nowhere")]).missing == [
        "libcuda.so", "libnvrtc.so", "libcudart.so", "cuda.h", "nvrtc.h",
    ]  # fmt: skip


def test_the_choice_is_printable_and_can_be_overridden():
    x = draw(5, 2)
    assert str(LazyKernel(RBFKernel(), x).backend()) == "chunked: KeOps is slower on a CPU"
    assert str(LazyKernel(RBFKernel(), x, backend="chunked").backend()) == "chunked: asked for"
    with pytest.warns(errors.BackendWarning, match="PolynomialKernel has no closed form"):
        assert LazyKernel(PolynomialKernel(power=2), x, backend="keops").backend().name == "chunked"


def test_a_race_takes_the_faster_and_is_run_once(fresh, monkeypatch):
    op = LazyKernel(RBFKernel(), draw(30, 2))._op
    seconds = iter([2.0, 1.0])
    monkeypatch.setattr(choice, "_seconds", lambda function, part, v: next(seconds))
    assert str(choice.race(op, 1)) == "chunked: measured on 30 × 30: KeOps 2000.0 ms, chunked 1000.0 ms"
    assert choice.race(op, 1).name == "chunked"
    seconds = iter([1.0, 2.0])
    assert choice.race(op, 2).name == "keops"


def test_a_kernel_without_a_closed_form_is_refused_by_the_backend_itself():
    class Own(Kernel):
        def forward(self, x1, x2, diag=False, **params):
            return x1 @ x2.mT

    with pytest.raises(errors.UnsupportedError, match='Own has no closed form for KeOps; use backend="chunked"'):
        keops.keops_product(LazyKernel(Own(), draw(3, 2))._op, draw(3, 1))
