"""The inducing basis: whitened features, and how sites cross from one basis to another."""

import gpytorch
import pytest
import reference as ref
import torch
from toys import F64, at, gap, gaussian, line, matern, rbf, unchecked, waves

from dualgp import DualGP, InducingBasis, errors
from dualgp.kernels import prior_covariance


def dense(Z: torch.Tensor, x: torch.Tensor, jitter: float) -> tuple[torch.Tensor, torch.Tensor]:
    Kzz = ref.rbf(Z, Z, 0.5, 1.3) + 1.3 * jitter * torch.eye(len(Z), dtype=F64)
    return Kzz, ref.rbf(Z, x, 0.5, 1.3)


def linear_mean() -> gpytorch.means.Mean:
    mean = gpytorch.means.LinearMean(1).double()
    mean.weights.data, mean.bias.data = at(0.7).unsqueeze(-1), at(1.1)
    return mean


def test_features_reproduce_the_nystrom_covariance_and_its_residual():
    Z, x = line(-1, 1, 6), line(-2, 2, 30)
    features = InducingBasis(rbf(), Z, linear_mean(), jitter=1e-6).features(x)
    Kzz, Kzx = dense(Z, x, 1e-6)
    Q = Kzx.T @ torch.linalg.solve(Kzz, Kzx)
    assert gap(features.phi @ features.phi.T, Q) < 1e-9
    assert gap(features.residual, 1.3 - Q.diagonal()) < 1e-9
    assert gap(features.prior_mean, 0.7 * x[:, 0] + 1.1) < 1e-14
    assert gap(features.prior_var, torch.full((30,), 1.3, dtype=F64)) < 1e-15


def test_features_at_the_inducing_points_are_the_cholesky_factor():
    Z = line(-1, 1, 6)
    basis = InducingBasis(rbf(), Z, jitter=0.0)
    assert gap(basis.features(Z).phi, basis.L) < 1e-9
    assert (basis.features(Z).residual < 1e-9).all()
    assert (basis.features(Z).residual >= 0).all()


def test_features_in_blocks_are_those_of_the_whole(monkeypatch):
    monkeypatch.setattr("dualgp.linalg._CHUNK_BYTES", 1)
    x, *_ = waves(300, 2)
    basis = InducingBasis(matern(), x[:9])
    blocks = list(basis.blocks(x))
    assert len(blocks) == 5
    assert gap(torch.cat([f.phi for _, f in blocks]), basis.features(x).phi) < 1e-12
    assert [r.start for r, _ in blocks] == [0, 64, 128, 192, 256]


def test_float32_features_are_whitened_in_float64_first():
    x, *_ = waves(200, 2)
    exact = InducingBasis(matern(2.0), x[:40], jitter=1e-4).features(x)
    low = InducingBasis(matern(2.0), x[:40].float(), jitter=1e-4).features(x.float())
    assert low.phi.dtype == torch.float32
    assert low.residual.dtype == low.prior_var.dtype == low.prior_mean.dtype == F64
    assert gap(low.phi @ low.phi.T, exact.phi @ exact.phi.T) < 1e-3


def test_a_basis_does_not_follow_what_it_was_made_of():
    kernel, mean, Z, x = rbf(), linear_mean(), line(-1, 1, 4), line(-2, 2, 5)
    basis = InducingBasis(kernel, Z, mean)
    before = basis.features(x)
    kernel.outputscale, mean.bias.data = 9.0, at(50.0)
    Z.zero_()
    after = basis.features(x)
    assert torch.equal(before.phi, after.phi)
    assert torch.equal(before.prior_mean, after.prior_mean)
    assert not any(p.requires_grad for p in (*basis.kernel.parameters(), *basis.mean.parameters()))


def test_features_follow_the_gradient_in_x():
    basis = InducingBasis(matern(), waves(6, 2)[0])
    x = torch.rand(3, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: basis.features(v).phi, (x,))
    assert torch.autograd.gradcheck(lambda v: basis.features(v).residual, (x,))


def test_a_move_of_z_and_back_to_a_superset_is_the_identity():
    x, *_ = waves(30, 2)
    small, large = InducingBasis(matern(), x[:5], jitter=1e-10), InducingBasis(matern(), x[:12], jitter=1e-10)
    there, _ = large.change_to(small)
    back, _ = small.change_to(large)
    assert gap(back @ there, torch.eye(5, dtype=F64)) < 1e-6  # w_small = back · w_large, of which w_small is a part
    assert gap(back @ back.T, torch.eye(5, dtype=F64)) < 1e-6


@pytest.mark.parametrize("jitter", [1e-10, 1e-6, 1e-3])
def test_an_input_keeps_its_jitter_whenever_z_moves(jitter):
    x, *_ = waves(30, 2)
    small = InducingBasis(matern(), x[:5], jitter=jitter)
    large = InducingBasis(matern(), x[[7, 1, 0, 8, 4, 2, 9, 3]], jitter=jitter)
    back, _ = small.change_to(large)
    assert gap(back @ back.mT, torch.eye(5, dtype=F64)) < 1e-9  # E[w_small | w_large] holds all of w_small
    there, _ = large.change_to(small)
    assert gap(back @ there, torch.eye(5, dtype=F64)) < 1e-9
    twice = InducingBasis(matern(), x[[0, 0, 1]], jitter=jitter)  # a copy of an input has a jitter of its own
    A, _ = twice.change_to(InducingBasis(matern(), x[[1, 0, 0]], jitter=jitter))
    assert torch.linalg.matrix_norm(A, ord=2) < 1 + 1e-9


def test_jitters_that_differ_share_the_smaller():
    x, *_ = waves(30, 2)
    kernel = gpytorch.kernels.LinearKernel().double() + matern()
    old, new = (InducingBasis(kernel, x[: 4 + k], jitter=1e-3) for k in (0, 3))
    A, _ = old.change_to(new)
    assert torch.linalg.matrix_norm(A, ord=2) <= 1 + 1e-12  # a covariance still: nothing is known better than it is


def test_a_change_of_hyperparameters_keeps_u():
    Z = line(-1, 1, 5)
    old = InducingBasis(rbf(0.5, 1.3), Z, linear_mean())
    mean = linear_mean()
    mean.bias.data = at(3.0)
    new = InducingBasis(rbf(0.9, 2.0), Z, mean)
    A, shift = old.change_to(new)
    w_new = torch.randn(5, dtype=F64)
    u = new.prior_mean(Z) + new.L @ w_new
    assert gap(old.prior_mean(Z) + old.L @ (A @ w_new + shift), u) < 1e-10


def test_the_identity_changes_nothing():
    x, *_ = waves(10, 2)
    A, shift = InducingBasis(matern(), x).change_to(InducingBasis(matern(), x))
    assert gap(A, torch.eye(10, dtype=F64)) < 1e-9
    assert gap(shift, torch.zeros(10)) == 0


def test_moves_that_mean_nothing_are_refused():
    x, *_ = waves(10, 2)
    old = InducingBasis(matern(0.8), x[:5])
    with pytest.raises(errors.BasisMismatchError, match="one, then the other"):
        old.change_to(InducingBasis(matern(0.9), x[:6]))
    with pytest.raises(errors.BasisMismatchError, match="one, then the other"):
        old.change_to(InducingBasis(matern(0.8), x[:6], gpytorch.means.ConstantMean().double()))
    with pytest.raises(errors.BasisMismatchError, match="Batch shapes"):
        old.change_to(InducingBasis(matern(0.8), x[:5], num_outputs=2))
    batch, outputs = InducingBasis(matern(), x[:6].expand(2, 6, -1)), InducingBasis(matern(), x[:6], num_outputs=2)
    for a, b in ((batch, outputs), (outputs, batch), (old, batch)):  # two processes are no process of two outputs
        with pytest.raises(errors.BasisMismatchError, match="Batch shapes"):
            a.change_to(b)


@pytest.mark.parametrize("other", [matern(0.8, nu=1.5), rbf(0.8, 2.0)], ids=["other nu", "other base kernel"])
def test_another_kernel_with_the_same_numbers_is_another_kernel(other):
    x, *_ = waves(10, 2)
    with pytest.raises(errors.BasisMismatchError):
        InducingBasis(matern(0.8, nu=2.5), x[:5]).change_to(InducingBasis(other, x[:6]))


def test_outputs_that_do_not_fit_the_kernel_are_refused():
    kernel = rbf(at(0.4, 3.0).reshape(2, 1, 1), at(1.0, 1.0), batch_shape=torch.Size([2]))
    with pytest.raises(errors.InputError, match=r"3 outputs .*got \(2,\)"):
        InducingBasis(kernel, line(0, 1, 3), num_outputs=3)
    assert InducingBasis(rbf(), line(0, 1, 3), num_outputs=3).batch_shape == (3,)
    for bad in (torch.zeros(3, dtype=F64), torch.zeros(3, 1).long()):
        with pytest.raises(errors.InputError, match="floating point of shape"):
            InducingBasis(rbf(), bad)
    with pytest.raises(errors.InputError, match="finite"):
        InducingBasis(rbf(), torch.full((3, 1), float("inf")))


def test_the_jitter_that_is_not_given_is_what_the_dtype_asks_for():
    Z = line(0, 1, 5)
    assert InducingBasis(rbf(), Z).jitter == 1e-8
    assert InducingBasis(rbf(), Z.float()).jitter == 1e-6
    assert InducingBasis(rbf(), Z, jitter=1e-5).at(Z).jitter == 1e-5
    gp = DualGP(rbf(), gaussian(), inducing_points=Z)
    gp.update(Z, Z[:, 0], learn_hyperparameters=False)
    assert gp.jitter == gp.posterior.basis.jitter == 1e-8


def test_standard_deviations_where_the_noise_is_small():
    """Noise variance 1e-4 beside amplitude 1, more inducing inputs than the function needs."""
    x = line(0, 6, 200)
    gp = DualGP(rbf(1.0), gaussian(1e-4), inducing_points=line(0, 6, 60))
    gp.update(x, (2 * x[:, 0]).sin(), learn_hyperparameters=False)
    K = prior_covariance(rbf(1.0), x).detach()
    exact = (K - K @ torch.linalg.solve(K + 1e-4 * torch.eye(200, dtype=F64), K)).diagonal()
    assert ((gp.predict(x)[1] / exact).sqrt() - 1).abs().max() < 5e-3


def test_a_basis_at_other_inputs_keeps_all_else():
    mean = gpytorch.means.ConstantMean().double()
    mean.constant = 2.0
    for basis in (
        InducingBasis(rbf(), line(0, 1, 4), mean, num_outputs=3, jitter=1e-4),
        InducingBasis.of_owned(rbf(), line(0, 1, 4), mean, num_outputs=3, jitter=1e-4),
    ):
        other = basis.at(line(0, 2, 5))
        assert other.batch_shape == basis.batch_shape == (3,)
        assert other.num_outputs == 3
        assert other.jitter == 1e-4
        assert gap(other.features(line(0, 1, 2)).prior_mean, 2.0) == 0


def test_modules_are_taken_as_they_are_or_copied():
    kernel, mean = rbf(), gpytorch.means.ConstantMean().double()
    owned, copied = InducingBasis.of_owned(kernel, line(0, 1, 4), mean), InducingBasis(kernel, line(0, 1, 4), mean)
    assert owned.kernel is kernel
    assert owned.mean is mean
    assert copied.kernel is not kernel
    assert copied.mean is not mean


def test_a_basis_without_a_mean_is_of_no_mean():
    kernel, mean = rbf(), gpytorch.means.ConstantMean().double()
    without, having = InducingBasis(kernel, line(0, 1, 4)), InducingBasis(kernel, line(0, 1, 4), mean)
    assert without.is_of(kernel, None)
    assert having.is_of(kernel, mean)
    assert not without.is_of(kernel, mean)
    assert not having.is_of(kernel, None)


def test_what_is_refused_says_why():
    basis = InducingBasis(rbf(), line(0, 1, 4))
    with pytest.raises(errors.InputError, match="^Inputs must be finite, but hold NaN or infinity"):
        basis.check_inputs(at(0.0, float("nan")).unsqueeze(-1))
    with unchecked(), pytest.raises(errors.InputError, match="^x must be a torch.Tensor, got list"):
        basis.check_inputs([[0.0]])
    with pytest.raises(errors.BasisMismatchError, match="^Both Z and the hyperparameters differ: move one"):
        basis.change_to(InducingBasis(rbf(0.1), line(0, 2, 4)))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"inducing_points": [[0.0]]}, errors.InputError, "^inducing_points must be a torch.Tensor, got list"),
        (
            {"inducing_points": torch.arange(3)},
            errors.InputError,
            "^inducing_points must be floating point of shape",
        ),
        ({"jitter": -1e-3}, errors.InputError, "^jitter must be ≥ 0"),
        ({"jitter": "small"}, errors.InputError, "^jitter must"),
        ({"mean": 0.0}, errors.UnsupportedError, "^mean must be a gpytorch.means.Mean or None, got float"),
        ({"kernel": "rbf"}, errors.UnsupportedError, "^Expected a gpytorch.kernels.Kernel, got str"),
    ],
)
def test_arguments_of_a_basis_are_refused_by_name(change, error, match):
    with unchecked(), pytest.raises(error, match=match):
        InducingBasis(**{"kernel": rbf(), "inducing_points": line(0, 1, 4), **change})
