"""`LazyKernel`: a kernel matrix that is never held, as the few products that inference asks of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float, Int
from torch import Tensor

from dualgp.checks import check_tensor
from dualgp.errors import InputError
from dualgp.kernels.choice import Choice, choose_backend
from dualgp.kernels.forms import as_form, form_diagonal
from dualgp.kernels.keops import keops_product
from dualgp.kernels.products import cross_covariance
from dualgp.kernels.tiles import Operand, Prepared, product, row_reduction
from dualgp.linalg import check_fits


class LazyKernel:
    """The matrix k(x, z), [n, m], of which no more than a tile is held at a time.

    Products are differentiable in x, z, their other factors and the hyperparameters; the backward pass computes every
    tile anew. Hyperparameters are read from the kernel at each product. RBF, Matérn, rational quadratic, periodic and
    linear kernels, and scales, sums and products of them, take a fused path in the dtype of x; every other GPyTorch
    kernel is evaluated by GPyTorch, tile by tile, in float64. Sums are float64.

    Args:
        kernel: a GPyTorch kernel without a batch shape.
        x: inputs of the rows, [n, D], float32 or float64.
        z: inputs of the columns, [m, D]; x if None: then half of the tiles serve for all.
        backend: "auto", "chunked" or "keops". "auto" is chunked on a CPU, and on a GPU what was faster on a part of the
            matrix. Where KeOps is asked for and does not work (`keops_status`), products are chunked, with a warning.

    Raises:
        UnsupportedError: for a kernel that has no lazy form.
        InputError: for inputs of another shape or dtype, or an unknown backend.

    Source: Charlier et al. 2021 (KeOps) for the idea; the augmented product of `kernels.stationary`.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> K = LazyKernel(RBFKernel(), torch.zeros(3, 1))
        >>> (K @ torch.ones(3)).detach()
        tensor([3., 3., 3.])
        >>> K.shape, str(K.backend(width=1))
        ((3, 3), 'chunked: KeOps is slower on a CPU')
    """

    def __init__(self, kernel: Kernel, x: Tensor, z: Tensor | None = None, *, backend: str = "auto") -> None:
        for name, t in (("x", x), ("z", x if z is None else z)):
            check_tensor(name, t)
            if t.ndim != 2 or t.dtype not in (torch.float32, torch.float64):
                raise InputError(f"{name} must be float32 or float64 [n, D], got {t.dtype} {tuple(t.shape)}.")
        if z is not None and (z.shape[-1] != x.shape[-1] or z.dtype != x.dtype or z.device != x.device):
            raise InputError(
                f"x and z must agree in columns, dtype and device; got {tuple(x.shape)} {x.dtype} on {x.device} and "
                f"{tuple(z.shape)} {z.dtype} on {z.device}."
            )
        if backend not in ("auto", "chunked", "keops"):
            raise InputError(f'backend must be "auto", "chunked" or "keops", got {backend!r}.')
        self.kernel, self.requested = kernel, backend
        self._op = Operand(kernel, as_form(kernel), x, z, x.dtype)

    def of(self, kernel: Kernel) -> LazyKernel:
        """Return the matrix of another kernel at the same inputs."""
        return LazyKernel(kernel, self._op.x, self._op.z, backend=self.requested)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        return self._op.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of tiles."""
        return self._op.dtype

    def __str__(self) -> str:
        return f"LazyKernel {self.shape[0]} × {self.shape[1]}, {self.dtype}: {self._op.form}"

    def backend(self, width: int = 1) -> Choice:
        """Return which backend products with [m, width] take, and why."""
        op = self._op
        return choose_backend(op, width, self.requested)

    def matvec(self, v: Tensor) -> Tensor:
        """Return K v, [n] or [n, w], in the dtype of v."""
        return self._multiply(v, self._op)

    __matmul__ = matvec

    def rmatvec(self, v: Tensor) -> Tensor:
        """Return Kᵀ v, [m] or [m, w], in the dtype of v."""
        op = self._op
        return self._multiply(v, op if op.z is None else op.at(op.z, op.x))

    def _multiply(self, v: Tensor, op: Operand) -> Tensor:
        m = op.shape[1]
        if v.ndim not in (1, 2) or v.shape[0] != m or not v.is_floating_point() or v.device != op.x.device:
            raise InputError(
                f"A product with a kernel matrix {op.shape} on {op.x.device} needs [{m}] or [{m}, w] there, got "
                f"{v.dtype} {tuple(v.shape)} on {v.device}."
            )
        wide = v.unsqueeze(-1) if v.ndim == 1 else v
        choice = choose_backend(op, wide.shape[-1], self.requested)
        out = keops_product(op, wide) if choice.name == "keops" else product(op, wide)
        out = out.to(v.dtype)
        return out.squeeze(-1) if v.ndim == 1 else out

    def columns(self, index: Int[Tensor, "k"]) -> Float[Tensor, "n k"]:
        """Return some columns, k(x, z[index]), dense, in the dtype of tiles.

        Raises:
            InputError: if they do not fit into memory.
        """
        op = self._op
        check_fits(len(op.x) * len(index), op.dtype, op.x.device, "columns of a kernel matrix", "ask for fewer at once")
        z = op.x if op.z is None else op.z
        return cross_covariance(self.kernel, op.x, z[index], op.dtype)

    @torch.no_grad()
    def column_reader(self) -> Callable[[int], Tensor]:
        """Return j ↦ column j [n], under the hyperparameters of now: features of the rows are made once for all."""
        prepared = Prepared.of(self._op)

        @torch.no_grad()
        def read(j: int) -> Tensor:
            return prepared.tile(slice(None), slice(j, j + 1))[:, 0]

        return read

    def diagonal(self) -> Float[Tensor, "n"]:
        """Return k(xᵢ, xᵢ) in float64; of a rectangular matrix, too, the prior variance at x."""
        return form_diagonal(self.kernel, self._op.x)

    def gram(self, beta: Float[Tensor, "n"]) -> Float[Tensor, "m m"]:
        """Return Σᵢ βᵢ kᵢkᵢᵀ with kᵢ = k(z, xᵢ), in float64: products in the dtype of tiles, sums in float64.

        Raises:
            InputError: if m² numbers do not fit into memory.
        """
        m = self.shape[1]
        check_fits(3 * m * m, torch.float64, self._op.x.device, "the Gram matrix of the columns", "use fewer columns")
        return row_reduction(self._op, _gram, True, beta, None)

    def quad_diag(self, A: Float[Tensor, "m m"]) -> Float[Tensor, "n"]:
        """Return kᵢᵀ A kᵢ with kᵢ = k(z, xᵢ) for every row, in float64."""
        return row_reduction(self._op, _quad, False, None, A)


def _gram(K: Tensor, beta: Tensor, _: None) -> Tensor:
    return ((K.mT * beta.to(K.dtype)) @ K).double()


def _quad(K: Tensor, _: None, A: Tensor) -> Tensor:
    return ((K @ A.to(K.dtype)) * K).double().sum(-1)
