"""What users get wrong is named, and nothing that is wrong in silence comes back."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpytorch.likelihoods import GaussianLikelihood, SoftmaxLikelihood
from leaning import diabetes, relative
from safetensors.torch import load_file, save_file
from sitemodels import F64, flat, prior_of
from torch import Tensor, nn
from toys import at, gap, unchecked

from dualgp import WeightLayout, WeightPosterior, WeightSite, errors, merge
from dualgp.likelihoods import LogitBernoulliLikelihood
from dualgp.transfer.clients import ClientTask, Reply
from dualgp.transfer.continual import KPrior, replay, residuals, soft_labels
from dualgp.transfer.curvature import kronecker_curvature, network_curvature
from dualgp.transfer.federated import FederatedServer
from dualgp.transfer.kronecker import KroneckerCurvature, KroneckerPosterior, KroneckerSite
from dualgp.transfer.memory import MemorySet, select_memory
from dualgp.transfer.merging import average, fine_tuned, fisher_average, gradient_mismatch
from dualgp.transfer.pac_bayes import PriorWithData, bma_risk, certify, gibbs_risk
from dualgp.transfer.shards import merge_shards

LOGIT = LogitBernoulliLikelihood()
SOFTMAX = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
LAYER = WeightLayout({"weight": torch.Size([2, 3]), "bias": torch.Size([2])})


def posterior(**prior: Tensor) -> WeightPosterior:
    return WeightPosterior(
        flat(2), WeightSite(at(1.0, 2.0), at(1.0, 1.0)), **({"prior_precision": at(1.0, 1.0)} | prior)
    )


def curvature(G: Tensor, A: Tensor) -> KroneckerCurvature:
    return KroneckerCurvature(LAYER, {("weight", "bias"): ((G, A),)}, torch.zeros(8))


def test_models_that_do_not_fit_each_other_are_refused():
    base, other = posterior(), posterior().to(dtype=torch.float32)
    for averaged in (average, fisher_average):
        with pytest.raises(errors.InputError, match="of one dtype"):
            averaged([base, other])
    with pytest.raises(errors.BasisMismatchError, match=r"a curvature is \[2\] or \[2, 2\], got \(3,\)"):
        fine_tuned(base, at(1.0, 2.0), at(1.0, 1.0, 1.0))
    with pytest.raises(errors.InputError, match="must be symmetric; this one is off by 5"):
        fine_tuned(base, at(1.0, 2.0), torch.tensor([[1.0, 5.0], [0.0, 1.0]], dtype=F64))
    kron = KroneckerPosterior(flat(2), prior_precision=1.0)
    with unchecked(), pytest.raises(errors.InputError, match="to_dense"):
        fisher_average([kron, kron])  # type: ignore[list-item]


def test_losses_that_are_no_number_are_refused():
    network = nn.Linear(2, 1, bias=False).double()
    q = WeightPosterior(WeightLayout.of(network), prior_precision=at(1.0, 1.0))
    x = torch.ones(3, 2, dtype=F64)
    with pytest.raises(errors.InputError, match=r"got \(3, 1\) numbers: sum them"):
        gradient_mismatch(network, at(1.0, 2.0), [lambda f: f(x)], [q])
    with pytest.raises(errors.InputError, match=r"have 2 weights, θ is \(3,\)"):
        gradient_mismatch(network, at(1.0, 2.0, 3.0), [lambda f: f(x).sum()], [q])
    with pytest.raises(errors.InputError, match="over weights that the network has not"):
        gradient_mismatch(nn.Linear(5, 1), at(1.0, 2.0), [lambda f: f(x).sum()], [q])
    assert gradient_mismatch(network, at(1.0, 0.0), [lambda f: 0 * f(x).sum()], [q]).relative == math.inf


def test_curvatures_in_factors_are_checked_when_they_are_made():
    eye = torch.eye
    with pytest.raises(errors.InputError, match="curvature is not finite"):
        curvature(eye(2) * math.nan, eye(4))
    twice = {("weight", "bias"): ((eye(2), eye(4)),), ("weight",): ((eye(2), eye(3)),)}
    with pytest.raises(errors.InputError, match=r"of one layer, got \['weight'\] in two"):
        KroneckerCurvature(LAYER, twice, torch.zeros(8))
    layout = WeightLayout({"weight": torch.Size([2, 3]), "bias": torch.Size([3])})
    with pytest.raises(errors.InputError, match="'bias' is no bias of 'weight'"):
        KroneckerCurvature(layout, {("weight", "bias"): ((eye(2), eye(4)),)}, torch.zeros(9))
    good = KroneckerSite(torch.ones(8), curvature(eye(2), eye(4)))
    with pytest.raises(errors.BasisMismatchError, match="of another network"):
        KroneckerPosterior(flat(8), good, prior_precision=1.0)
    with pytest.raises(errors.InputError, match="not finite"):
        KroneckerPosterior(LAYER, replace(good, lam=good.lam * math.inf), prior_precision=1.0)
    with pytest.raises(errors.NotPositiveDefiniteError, match="smallest eigenvalue -1"):
        KroneckerPosterior(LAYER, prior_precision=-1.0)
    base = WeightPosterior(LAYER, prior_precision=torch.ones(8))
    with pytest.raises(errors.BasisMismatchError, match="has 8 weights, the model"):
        KroneckerPosterior.fine_tuned(base, torch.ones(7), good.B)
    with unchecked(), pytest.raises(errors.BasisMismatchError, match="add to their like"):
        good + WeightSite(torch.ones(8), torch.ones(8))  # type: ignore[operator]


def test_a_curvature_has_as_many_targets_as_data():
    network, x = nn.Linear(4, 3), torch.ones(5, 4)
    for of in (network_curvature, kronecker_curvature):
        with pytest.raises(errors.InputError, match="a target for each of 5 data, got 9"):
            of(network, x, torch.zeros(9).long(), SOFTMAX)
    with pytest.raises(errors.InputError, match="finite and ≥ 0"):
        network_curvature(network, x, torch.zeros(5).long(), SOFTMAX, weights=-torch.ones(5))


def test_a_penalty_counts_in_replies_by_mean_and_curvature():
    """Ridge is joint after one round, also where a client that minimised ℓ/penalty answers with a mean."""
    X, y = diabetes()
    parts = list(zip(X.tensor_split(3), y.tensor_split(3), strict=True))
    server = FederatedServer.start(prior_of(11), "012", "bayes-admm", penalty=3.0)

    def answer(task: ClientTask, X: Tensor, y: Tensor) -> Reply:
        q = task.cavity.add(WeightSite(X.T @ y, X.T @ X) * (1.0 / task.penalty))
        return task.reply(q.mean, X.T @ X)

    server = server.close([answer(server.task(str(k)), *part) for k, part in enumerate(parts)])
    truth = torch.linalg.solve(X.T @ X + torch.eye(11, dtype=F64), X.T @ y)
    assert relative(server.posterior.mean, truth) < 1e-12


def test_servers_and_replies_that_cannot_be_are_refused():
    prior = prior_of(2)
    server = FederatedServer.start(prior, "ab")
    with pytest.raises(errors.InputError, match="diverges from a step of 2/K"):
        FederatedServer(prior, {"a": None, "b": None}, "fedlap", 1.5)
    with pytest.raises(errors.InputError, match="has a site"):
        FederatedServer(posterior(), {"a": None}, "fedlap", 0.5)
    with unchecked(), pytest.raises(errors.InputError, match="structure"):
        FederatedServer.start(prior, "ab", structure="kronecker")  # type: ignore[arg-type]
    with unchecked(), pytest.raises(errors.InputError, match="got NoneType; leave out clients that did not answer"):
        server.close([None])  # type: ignore[list-item]
    for mean, B in ((at(1.0), at(1.0)), (at(1.0, 1.0), at(1.0, 1.0, 1.0))):
        with pytest.raises(errors.BasisMismatchError, match="has 2 weights; client 'a'"):
            server.task("a").reply(mean, B)
    with unchecked(), pytest.raises(errors.BasisMismatchError, match="not those of a KroneckerPosterior"):
        server.task("a").reply_posterior(KroneckerPosterior(flat(2), prior_precision=1.0))  # type: ignore[arg-type]
    linear = FederatedServer.start(prior, "ab", "fedlap")
    with pytest.raises(errors.InputError, match='those of "fedlap" are linear'):
        linear.close([Reply("a", 0, WeightSite(at(1.0, 1.0), at(1.0, 1.0)))])
    with pytest.raises(errors.InputError, match="has no sites of functions"):
        FederatedServer.start(prior, "ab", "bayes-admm").task("a").reply_functions(nn.Linear(1, 1), None, at(1.0, 1.0))


def test_losses_of_targets_without_their_dimension_are_the_same():
    """[n] beside outputs [n, 1] would broadcast to [n, n]."""
    network, x = nn.Linear(2, 1).double(), torch.randn(6, 2, dtype=F64)
    f, ones = network(x).detach(), torch.ones(6, dtype=F64)
    two = nn.Linear(2, 1).double()
    whole, bare = (soft_labels(MemorySet(x, t, ones), LOGIT)(two) for t in (f, f.squeeze(-1)))
    assert gap(whole.detach(), bare.detach()) < 1e-14
    y = (f > 0).double()
    doubled = replay(x, y, LOGIT, 2 * ones.unsqueeze(-1))(two)
    assert gap(doubled.detach(), 2 * replay(x, y.squeeze(-1), LOGIT)(two).detach()) < 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: soft_labels(MemorySet(x, y, torch.ones(6)), LOGIT)(nn.Linear(2, 3)), r"got \(6, 3\)"),
        (lambda x, y: residuals(MemorySet(x, y, torch.ones(6), y), LOGIT)(nn.Linear(2, 3)), r"got \(6, 3\)"),
        (lambda x, y: replay(x, y[:5], LOGIT), "as many inputs, targets and weights"),
        (lambda x, y: replay(x, y, LOGIT, torch.ones(5)), "as many inputs, targets and weights"),
        (lambda x, y: replay(x, 2 + y, LOGIT), "LogitBernoulliLikelihood has no target 2"),
        (lambda x, y: replay(x, torch.full((6,), 1.5), SOFTMAX), "SoftmaxLikelihood has no target 1.5"),
        (lambda x, y: replay(x, torch.full((6,), 3), SOFTMAX)(nn.Linear(2, 3)), r"classes 0 … 2 .* up to 3"),
        (lambda x, y: replay(x, y.long(), SOFTMAX)(nn.Linear(2, 3)), r"classes 0 … 2 of 6 data, \[6\], got \(6, 1\)"),
        (lambda x, y: replay(x, y * math.nan, GaussianLikelihood()), "GaussianLikelihood has no target nan"),
        (lambda x, y: MemorySet(x, y * math.nan, torch.ones(6)), "diverged is no memory"),
        (lambda x, y: MemorySet(x, y, -torch.ones(6)), "weights ≥ 0"),
        (lambda x, y: MemorySet(x, y, torch.ones(6, 1)), r"weights ≥ 0 \[m\], got weights \(6, 1\)"),
        (lambda x, y: MemorySet(x, y, torch.ones(6)).join(MemorySet(x, x, torch.ones(6))), "of one network join"),
        (lambda x, y: select_memory(y, y, LOGIT, 2, var=torch.ones(5)), "a variance for each"),
        (lambda x, y: KPrior.of(nn.Linear(2, 1), x, LOGIT, prior_precision=1.0, rest=torch.ones(5)), "has 3 weights"),
        (
            lambda x, y: KPrior.of(nn.Linear(2, 1), x, LOGIT, prior_precision=1.0).term()(nn.Linear(4, 1)),
            "not the weig",
        ),
    ],
)
def test_what_cannot_be_a_memory_is_refused(call, message):
    with pytest.raises(errors.InputError, match=message):
        call(torch.randn(6, 2), torch.zeros(6, 1))


def test_data_that_were_no_part_of_the_quadratic_are_not_taken_out_of_the_prior():
    """The prior alone is precise enough to leave a Gaussian, which says nothing of the data."""
    network, x = nn.Linear(2, 1), torch.randn(6, 2)
    K = KPrior.of(network, x[:2], LOGIT, prior_precision=50.0, rest=torch.full((3,), 1e-3))
    with pytest.raises(errors.NotPositiveDefiniteError, match="no part of the quadratic"):
        K.remove_data(network, x[2:], torch.ones(4, 1))


def test_a_memory_leaves_a_batch_norm_that_trains_alone():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.randn(6, 2)
    found = MemorySet.of(network, x)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert gap(found.f, network(x).detach()) < 1e-6


def certificate(**changes: object) -> object:
    x, y = torch.arange(100.0).view(50, 2), torch.zeros(50)
    p = prior_of(2)
    given = {"q": p, "prior": PriorWithData.without_data(p), "x": x, "y": y, "losses": torch.zeros(4, 50)} | changes
    return certify(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": torch.zeros(50)}, r"at S draws, \[S, 50\]; got \(50,\)"),  # a row for each datum, 50 draws of none
        ({"losses": torch.zeros(0, 50)}, r"got \(0, 50\)"),
        ({"losses": torch.zeros(50, 4)}, r"got \(50, 4\)"),
        ({"losses": torch.full((4, 50), math.nan)}, "between nan"),
        ({"delta": 0.0}, "δ is a probability"),
        ({"delta": 1.0}, "δ is a probability"),
        ({"bound": "hoeffding"}, "got 'hoeffding'"),
        ({"prior": prior_of(2)}, "and a WeightPosterior"),
    ],
)
def test_what_is_no_certificate_is_refused(changes, message):
    with unchecked(), pytest.raises(errors.InputError, match=message):
        certificate(**changes)


def test_rows_that_a_prior_has_seen_are_found_in_any_order_and_dtype():
    x, y = torch.arange(100.0).view(50, 2), torch.zeros(50)
    for seen in ((x[7:8], y[7:8]), (x[[30, 3]].double(), y[[30, 3]].double()), (x[7:8], y[7:8].long())):
        with pytest.raises(errors.InputError, match="have had a part in the prior"):
            certificate(prior=PriorWithData.from_data(prior_of(2), *seen))
    with pytest.raises(errors.InputError, match="A prior is a Gaussian without a site"):
        PriorWithData(posterior(), torch.zeros(0, dtype=torch.int64))


def test_risks_of_nothing_are_refused():
    with unchecked():
        with pytest.raises(errors.InputError, match="one draw and one datum"):
            gibbs_risk(torch.zeros(0, 5))
        with pytest.raises(errors.InputError, match=r"\[S, 4, C\]"):
            bma_risk(torch.zeros(3, 5, 2), torch.zeros(4).long())
        with pytest.raises(errors.InputError, match="none NaN"):
            bma_risk(torch.full((3, 5, 2), math.nan), torch.zeros(5).long())


def written(path: Path, header: object, numbers: int = 3) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4 * numbers)
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({n: {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]} for n in "vw"}, "two tensors overlap"),
        ({"w": {"dtype": "F32", "shape": [-3], "data_offsets": [0, -12]}}, "negative size or place"),
        ({"w": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]}}, "is no safetensors file"),
        ([1, 2], "is no safetensors file"),
    ],
)
def test_headers_that_lie_are_found(tmp_path, header, message):
    file = written(tmp_path / "m", header)
    with pytest.raises(errors.InputError, match=message):
        merge_shards(file, [file], tmp_path / "o")


def test_a_merge_that_would_write_infinities_is_refused(tmp_path):
    for dtype, value in ((torch.float32, 3e38), (torch.float16, 6e4)):
        base, model = tmp_path / f"b{dtype}", tmp_path / f"m{dtype}"
        save_file({"w": torch.full((3,), value, dtype=dtype)}, base)
        save_file({"w": torch.full((3,), -value, dtype=dtype)}, model)
        with pytest.raises(errors.InputError, match="The merged 'w' is too large for torch.float"):
            merge_shards(base, [model], tmp_path / "o", weights=[3.0])
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("o")]
    with pytest.raises(errors.InputError, match="no folder"):
        merge_shards(base, [model], tmp_path / "no" / "o")
    with pytest.raises(errors.InputError, match="Scales are of curvatures"):
        merge_shards(base, [model], tmp_path / "o", scales=[2.0])
    with unchecked(), pytest.raises(errors.InputError, match="a number or a path, got a Tensor"):
        merge_shards(base, [model], tmp_path / "o", base_precision=torch.ones(()))  # type: ignore[arg-type]
    (tmp_path / "f").mkdir()
    save_file(load_file(base), tmp_path / "f" / "a.safetensors")
    (tmp_path / "f" / "a.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(errors.InputError, match="it names no shard"):
        merge_shards(tmp_path / "f", [tmp_path / "f"], tmp_path / "o")


def test_a_merge_of_no_evidence_is_the_prior():
    """Weights of 0 leave products of nothing, which have no trace to precondition by."""
    q = KroneckerPosterior(
        LAYER, KroneckerSite(torch.ones(8), curvature(torch.eye(2), torch.eye(4))), prior_precision=2.0
    )
    none = merge([q, q], [0.0, 0.0])
    assert gap(none.mean, torch.zeros(8)) == 0
    assert gap(none.variance(), torch.full((8,), 0.5)) == 0
