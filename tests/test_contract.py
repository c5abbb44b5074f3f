"""The sentences of "Options, exactly" that every backend obeys."""

import math

import pytest
import torch
from problems import FORMS, Problem, cotangent, fit, random_problem
from torch.testing import assert_close

import capsroute

NAN, INF = math.nan, math.inf

with_coupling = pytest.mark.parametrize("coupling", ["out", "in"])


def by_sample(problem: Problem) -> str:
    """The name of the input, votes or u."""
    return next(iter(problem.tensors))


# Mask


# Rows that are not whole vectors, and rows that are.
SIZES = [(6, 9, 3, 3, 5), (6, 70, 8, 3, 8)]


@with_coupling
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_mask_selects_whatever_is_masked(backend, coupling, form, iterations, poison, sizes):
    problem = random_problem(
        fit(backend, sizes), form=form, logits="BIJ", mask="BI", iterations=iterations, coupling=coupling
    )
    masked = ~problem.mask

    def fill(name, x, value):
        return x if name == "weight" else x.masked_fill(masked.reshape(*masked.shape, *(1,) * (x.dim() - 2)), value)

    clean, poisoned = (
        Problem({name: fill(name, x, value) for name, x in problem.tensors.items()}, problem.mask, problem.options)
        for value in (0.0, poison)
    )
    for x, y in zip(clean.run(backend, return_coupling=True), poisoned.run(backend, return_coupling=True), strict=True):
        assert torch.equal(x, y)
    expected = clean.gradients(backend)
    for name, grad in poisoned.gradients(backend).items():
        assert torch.equal(grad, expected[name]), name
        if name in ("u", "votes", "logits"):
            assert not grad[masked].any(), name


@with_coupling
def test_a_masked_input_has_no_gradient_whatever_its_weight_holds(backend, coupling):
    problem = random_problem((2, 5, 3, 4, 6), form="ijod", mask="BI", coupling=coupling)
    problem.mask[:, 2] = False
    problem.tensors["weight"][2] = INF
    assert not problem.gradients(backend)["u"][:, 2].any()


@with_coupling
def test_masked_input_capsules_count_as_absent(backend, coupling):
    problem = random_problem((4, 9, 3, 3, 5), bias=True, logits="IJ", coupling=coupling)
    keep = torch.arange(9) % 3 != 1
    v = problem.run(backend, mask=keep)
    absent = {
        name: x[:, keep] if name == "u" else x[keep] if name in ("weight", "logits") else x
        for name, x in problem.tensors.items()
    }
    assert_close(v, Problem(absent, None, problem.options).run(backend))


@with_coupling
@pytest.mark.parametrize("name", ["u", "votes", "logits"])
def test_nan_stays_in_its_sample(backend, coupling, name):
    form = "votes" if name == "votes" else "ijod"
    problem = random_problem((6, 9, 3, 3, 5), form=form, logits="BIJ", forbid=True, mask="BI", coupling=coupling)
    problem.mask[2, 4] = True
    problem.tensors["logits"][2, 4] = 0
    clean = problem.gradients(backend)
    problem.tensors[name][2, 4, ..., 1] = NAN
    found = problem.gradients(backend)
    others = torch.arange(6) != 2
    assert found["v"][2].isnan().any()
    for per_sample in ("v", by_sample(problem), "logits"):
        assert torch.equal(found[per_sample][others], clean[per_sample][others]), per_sample
    assert not found[by_sample(problem)][~problem.mask].any()
    assert not found["logits"][~problem.mask].any()
    forbidden = problem.tensors["logits"] == -INF
    assert not found["logits"][forbidden].any()
    assert form != "votes" or not found["votes"][forbidden].any()


@with_coupling
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("sizes", [(2, 3, 4, 5), (2, 3, 70, 20)], ids=str)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_vote_that_is_not_finite_stays_in_its_number_without_a_query(backend, value, sizes, prior, coupling):
    votes = torch.randn(sizes)
    votes[0, 1, 2, 3] = value
    votes.requires_grad_()
    logits = torch.randn(sizes[:-1], requires_grad=True) if prior else None
    s = capsroute.votes_pass(votes, None, logits=logits, coupling=coupling, backend=backend)
    assert (~s.isfinite()).nonzero().tolist() == [[0, 2, 3]]
    leaves = [votes, logits] if prior else [votes]
    assert torch.autograd.grad(s, leaves, cotangent(s))[0].isfinite().all()


def test_a_logit_of_nan_is_in_all_pairs_of_its_row_that_are_allowed(backend):
    """Also in one so far below the largest that its coupling would be 0."""
    votes = torch.ones(1, 1, 4, 2, requires_grad=True)
    logits = torch.tensor([NAN, 0.0, -200.0, -INF]).view(1, 1, 4)
    s, c = capsroute.votes_pass(votes, None, logits=logits, return_coupling=True, backend=backend)
    grad = torch.autograd.grad(s, votes, torch.ones_like(s))[0]
    for x in (c[0, 0], s[0, :, 0], grad[0, 0, :, 0]):
        assert x.isnan().tolist() == [True, True, True, False]
        assert x[3] == 0


@with_coupling
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_fully_masked_sample_gives_squashed_bias(backend, coupling, form, bias):
    problem = random_problem((5, 9, 3, 3, 5), form=form, bias=bias, logits="BIJ", coupling=coupling)
    problem.tensors[by_sample(problem)][3] = NAN
    mask = torch.ones(5, 9, dtype=torch.bool)
    mask[3] = False
    found = Problem(problem.tensors, mask, problem.options)
    v, c = found.run(backend, return_coupling=True)
    assert_close(v[3], capsroute.squash(problem.tensors["bias"]) if bias else torch.zeros_like(v[3]))
    assert not c[3].any()
    for name, grad in found.gradients(backend).items():
        assert grad.isfinite().all(), name


@with_coupling
@pytest.mark.parametrize("form", FORMS)
def test_no_input_capsules_give_squashed_bias(backend, coupling, form):
    problem = random_problem((5, 0, 3, 3, 5), form=form, bias=True, logits="BIJ", coupling=coupling)
    v, c = problem.run(backend, return_coupling=True)
    bias = problem.tensors["bias"].requires_grad_()
    expected = capsroute.squash(bias).expand(5, 3, 5)
    assert_close(v, expected)
    assert c.shape == (5, 0, 3)
    grads = problem.gradients(backend)
    assert_close(grads["bias"], torch.autograd.grad(expected, bias, cotangent(v))[0])
    for name, x in problem.tensors.items():
        assert grads[name].shape == x.shape
        assert name == "bias" or not grads[name].any()
    without = {name: x for name, x in problem.tensors.items() if name != "bias"}
    assert not Problem(without, None, problem.options).run(backend).any()


# Forbidden pairs


@with_coupling
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("poison", [1.0, NAN, INF])
@pytest.mark.parametrize("iterations", [1, 3])
def test_minus_infinity_forbids_a_pair(backend, coupling, iterations, poison, sizes):
    problem = random_problem(fit(backend, sizes), form="votes", logits="BIJ", forbid=True, iterations=iterations)
    problem.options["coupling"] = coupling
    problem.tensors["logits"][:, :, 2] = -INF  # a whole column
    problem.tensors["logits"][:, 6] = -INF  # a whole row
    forbidden = problem.tensors["logits"] == -INF
    problem.tensors["votes"][forbidden] = poison
    v, c = problem.run(backend, return_coupling=True)
    assert not c[forbidden].any()
    assert c.isfinite().all()
    assert not v[:, 2].any()
    found = problem.gradients(backend)
    for name, value in found.items():
        assert value.isfinite().all(), name
    assert not found["votes"][forbidden].any()
    assert not found["logits"][forbidden].any()


@with_coupling
@pytest.mark.parametrize("poison", [1.0, NAN, INF])
@pytest.mark.parametrize("form", ["ijod", "jod", "od"])
def test_minus_infinity_forbids_a_pair_of_a_weight(backend, coupling, form, poison):
    problem = random_problem((4, 9, 3, 5, 5), form=form, logits="BIJ", forbid=True, mask="BI", coupling=coupling)
    problem.tensors["logits"][:, 6] = -INF  # a whole row
    forbidden = problem.tensors["logits"] == -INF
    found = problem.gradients(backend)
    for name, value in found.items():
        assert value.isfinite().all(), name
    assert not found["logits"][forbidden].any()
    problem.tensors["u"][:, 6] = poison
    v, c = problem.run(backend, return_coupling=True)
    assert torch.equal(v, found["v"])
    assert not c[forbidden].any()


def test_a_pair_that_couples_in_a_later_pass_is_not_forbidden(backend):
    """Its coupling in the first pass is exp(-300), 0 in float32, beside a pair that is forbidden."""
    weight = torch.zeros(2, 2, 2, 1)
    weight[:, 0, 0], weight[1, 1, 1], weight[0, 1, 0] = 300, 1, 1
    weight.requires_grad_()
    logits = torch.tensor([[-300.0, 0.0], [0.0, -INF]])

    def gradient(name):
        v = capsroute.capsule_linear(torch.ones(1, 2, 1), weight, 2, logits=logits, backend=name)
        return torch.autograd.grad(v, weight, torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]))[0]

    expected = gradient("reference")
    assert expected[0, 0].abs().max() > 0.1
    assert_close(gradient(backend), expected)


@with_coupling
@pytest.mark.parametrize("detach_coupling", [False, True])
def test_a_forbidden_pair_has_no_gradient_in_a_sample_of_nan(backend, coupling, detach_coupling):
    options = {"coupling": coupling, "iterations": 2, "detach_coupling": detach_coupling}
    problem = random_problem((2, 5, 3, 3, 5), form="votes", logits="IJ", **options)
    problem.tensors["logits"][0, 1] = -INF
    problem.tensors["votes"][0, 2] = NAN
    assert not problem.gradients(backend)["votes"][:, 0, 1].any()


@with_coupling
@pytest.mark.parametrize(("form", "outputs"), [*((form, 3) for form in FORMS), ("ijod", 70), ("votes", 70)])
def test_a_gradient_of_nan_stays_in_an_output_that_is_forbidden(backend, coupling, form, outputs):
    """v of an output capsule without inputs is 0, and the gradient of |v| is NaN there."""
    problem = random_problem((3, 9, 3, outputs, 17), form=form, logits="BIJ", coupling=coupling)
    problem.tensors["logits"][..., 1] = -INF
    leaves = {name: x.requires_grad_() for name, x in problem.tensors.items()}
    v = problem.run(backend)
    assert not v[:, 1].any()
    grad_v = cotangent(v)
    grad_v[:, 1] = 0
    expected = torch.autograd.grad(v, list(leaves.values()), grad_v, retain_graph=True)
    grad_v[:, 1] = NAN
    found = torch.autograd.grad(v, list(leaves.values()), grad_v)
    for name, x, y in zip(leaves, found, expected, strict=True):
        assert torch.equal(x, y), name


@with_coupling
@pytest.mark.parametrize("form", ["jod", "od"])
def test_a_gradient_of_nan_reaches_the_weight_of_inputs_that_are_zero(backend, coupling, form):
    """0 * NaN is NaN: an output capsule is forbidden by its logits, not by a sum of zeros."""
    problem = random_problem((2, 4, 3, 3, 5), form=form, logits="BIJ", iterations=1, coupling=coupling)
    problem.tensors["u"].zero_()
    assert problem.gradients(backend, torch.full((2, 3, 5), NAN), ["weight"])["weight"].isnan().all()


@pytest.mark.parametrize("form", ["jod", "od"])
def test_over_inputs_a_gradient_of_nan_stays_in_a_sample_that_is_masked(backend, form):
    """Where the softmax runs over i, a masked pair is a forbidden one."""
    problem = random_problem((2, 4, 3, 3, 5), form=form, logits="J", mask="BI", iterations=2, coupling="in")
    problem.mask[0] = False
    grad_v = torch.ones(2, 3, 5)
    grad_v[0] = NAN
    assert problem.gradients(backend, grad_v, ["weight"])["weight"].isfinite().all()


def test_leak_takes_all_of_a_forbidden_row(backend):
    problem = random_problem(logits="BIJ", leaky=True)
    problem.tensors["logits"][1] = -INF
    v, c = problem.run(backend, return_coupling=True)
    assert not c[1].any()
    assert not v[1].any()
    assert all(x.isfinite().all() for x in problem.gradients(backend).values())


@pytest.mark.parametrize("forbid", [False, True])
def test_agreements_beyond_all_numbers_are_nan_whatever_another_input_may_not(cpu, forbid):
    """Logits that are all -inf by overflow are not a row that is forbidden."""
    problem = random_problem((1, 2, 3, 2, 1), form="votes", dtype=torch.float32, logits="BIJ", query="BJO")
    problem.tensors["votes"][0, 0], problem.tensors["query"][:] = 1e30, -1e30
    problem.tensors["logits"][0, 1, 0] = -INF if forbid else 0
    for backend in ("reference", cpu):
        s, c = problem.run(backend, return_coupling=True)
        assert c[0, 0].isnan().all()
        assert s.isnan().all()


@with_coupling
@pytest.mark.parametrize("shape", ["BIJ", "B1J", "J"])
def test_a_gradient_of_nan_reaches_logits_of_any_shape(backend, coupling, shape):
    problem = random_problem((2, 3, 4, 2, 5), logits=shape, coupling=coupling)
    problem.tensors["u"][0, 0, 0] = NAN
    grad = problem.gradients(backend)["logits"]
    assert grad.isnan().any(-1).flatten()[0]
    if shape != "J":
        assert not grad[1].isnan().any()


@pytest.mark.parametrize("leaky", [False, True])
def test_the_maximum_is_subtracted_before_exp(backend, leaky):
    problem = random_problem((3, 9, 3, 5, 5), bias=True, logits="BIJ", dtype=torch.float32, leaky=leaky)
    problem.tensors["logits"] *= 1e4
    c = problem.run(backend, return_coupling=True)[1]
    winner = problem.tensors["logits"].max(-1, keepdim=True).values
    assert_close(c, ((problem.tensors["logits"] == winner) & ~(leaky & (winner < 0))).float())
    assert all(x.isfinite().all() for x in problem.gradients(backend).values())


@with_coupling
@pytest.mark.parametrize("form", ["ijod", "jod", "votes"])
@pytest.mark.parametrize(("length", "features", "logits"), [(1e12, 6, None), (1e3, 36, "BIJ")])
def test_gradients_of_long_votes(backend, coupling, form, length, features, logits):
    """Each couples wholly to one from the second pass on, whose logits then have a gradient of 0, not of rounding.

    More features than a vector or a slice has are added in parts, and the prior logits with them: in each stream in the
    same order. Where Triton's kernels do not, docs/gpu.md says.
    """
    in_another_order = form == "jod" or (form == "ijod" and features == 36)
    if backend == "triton" and coupling == "in" and in_another_order:
        length = 1
    sizes = (2, 5, features // 2, 4, features)
    problem = random_problem(sizes, form=form, coupling=coupling, logits=logits, dtype=torch.float32)
    problem.tensors[by_sample(problem)] *= length
    expected = problem.map(lambda x: x.double()).gradients("reference")
    for name, value in problem.gradients(backend).items():
        largest = max(expected[name].abs().max().item(), name == "logits")  # theirs is 0 in truth, and else about 1
        assert_close(value.double(), expected[name], rtol=0, atol=1e-5 * largest, msg=name)


# Detached coupling, returned coupling, leak


@with_coupling
@pytest.mark.parametrize("form", FORMS)
def test_detached_coupling_is_a_constant_of_the_last_pass(backend, coupling, form):
    problem = random_problem((3, 9, 3, 3, 5), form=form, bias=True, logits="BIJ", mask="BI", coupling=coupling)
    problem.options["detach_coupling"] = True
    c = problem.run(backend, return_coupling=True)[1]
    leaves = {name: x.detach().requires_grad_() for name, x in problem.tensors.items()}
    if form == "votes":
        votes = leaves["votes"]
    else:
        weight = leaves["weight"].expand(9, 3, 5, 3)
        votes = torch.einsum("bid,ijod->bijo", leaves["u"], weight)
    v = capsroute.squash(torch.einsum("bij,bijo->bjo", c, votes) + leaves["bias"])
    found = problem.gradients(backend)
    assert_close(found.pop("v"), v)
    assert found.pop("logits") is None
    for name, grad in found.items():
        assert_close(grad, torch.autograd.grad(v, leaves[name], cotangent(v), retain_graph=True)[0])


def test_with_detached_coupling_logits_alone_get_no_gradient(backend):
    problem = random_problem(logits="BIJ", detach_coupling=True)
    problem.tensors["logits"].requires_grad_()
    assert not problem.run(backend).requires_grad


@with_coupling
@pytest.mark.parametrize("name", ["query", "logits"])
def test_a_gradient_has_the_same_bits_whatever_else_wants_one(backend, coupling, name):
    """Of one pass from a query, over votes so alike that the mean of their slopes is nearly all of each."""
    tensors = {
        "votes": 3 + 0.05 * torch.randn(2, 64, 2, 8),
        "query": torch.randn(2, 2, 8),
        "logits": torch.randn(2, 64, 2),
    }

    def gradient(*wanted):
        leaves = {key: x.clone().requires_grad_(key in wanted) for key, x in tensors.items()}
        s = capsroute.votes_pass(**leaves, coupling=coupling, backend=backend)
        return torch.autograd.grad(s, leaves["votes"], cotangent(s))[0]

    assert torch.equal(gradient("votes", name), gradient("votes"))


@with_coupling
def test_returned_coupling_carries_no_gradient(backend, coupling):
    problem = random_problem((3, 9, 3, 3, 5), logits="BIJ", coupling=coupling).map(lambda x: x.requires_grad_())
    v, c = problem.run(backend, return_coupling=True)
    assert v.requires_grad
    assert not c.requires_grad


@with_coupling
def test_returned_coupling_of_a_pass_carries_no_gradient(backend, coupling):
    problem = random_problem(query="BJO", coupling=coupling).map(lambda x: x.requires_grad_())
    s, c = problem.run(backend, return_coupling=True)
    assert s.requires_grad
    assert not c.requires_grad


@with_coupling
def test_returned_coupling_is_normalised(backend, coupling):
    c = random_problem((3, 9, 3, 3, 5), coupling=coupling).run(backend, return_coupling=True)[1]
    total = c.sum(-1 if coupling == "out" else -2)
    assert_close(total, torch.ones_like(total))


def test_leak_is_not_in_the_returned_coupling(backend):
    c = random_problem(leaky=True, iterations=1).run(backend, return_coupling=True)[1]
    assert_close(c, torch.full_like(c, 1 / 4))  # J = 3, and the leak


def test_eps_is_inside_the_root(backend):
    votes = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)  # [I, J, O]
    v = capsroute.dynamic_routing(votes, 1, eps=11.0, backend=backend)
    assert_close(v, 25 / 26 * votes[0] / 6)


# Shapes and dtypes


@with_coupling
@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("form", ["ijod", "votes"])
def test_leading_dimensions_are_a_batch(backend, coupling, form, lead):
    count = math.prod(lead)
    flat = random_problem((count, 5, 2, 3, 4), form=form, bias=True, logits="BIJ", mask="BI", coupling=coupling)

    def shape(x):
        return x.reshape(*lead, *x.shape[1:])

    per_sample = (by_sample(flat), "logits")
    tensors = {name: shape(x) if name in per_sample else x for name, x in flat.tensors.items()}
    shaped = Problem(tensors, shape(flat.mask), flat.options)
    v, c = shaped.run(backend, return_coupling=True)
    expected_v, expected_c = flat.run(backend, return_coupling=True)
    assert_close(v, shape(expected_v))
    assert_close(c, shape(expected_c))
    expected = flat.gradients(backend, cotangent(v).reshape(expected_v.shape))
    for name, grad in shaped.gradients(backend).items():
        assert_close(grad, shape(expected[name]) if name in (*per_sample, "v") else expected[name])


@with_coupling
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 1), (4, 1, 1), (4, 5, 3), (2, 1, 5, 3), (1, 4, 1, 3)])
def test_logits_broadcast_and_their_gradient_is_summed_back(backend, coupling, shape):
    problem = random_problem((8, 5, 2, 3, 4), coupling=coupling)
    problem.tensors["u"] = problem.tensors["u"].reshape(2, 4, 5, 2)
    logits = torch.randn(shape, dtype=torch.float64)
    small, full = (
        Problem({**problem.tensors, "logits": x}, None, problem.options).gradients(backend)["logits"]
        for x in (logits, logits.expand(2, 4, 5, 3).clone())
    )
    assert small.shape == shape
    assert_close(small, full.sum_to_size(shape))


@with_coupling
@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 1), (4, 5), (2, 1, 5), (1, 4, 1)])
def test_mask_broadcasts(backend, coupling, shape):
    u, weight, mask = torch.randn(2, 4, 5, 2), torch.randn(5, 3, 4, 2), torch.rand(shape) < 0.5
    small, full = (
        capsroute.capsule_linear(u, weight, mask=x, coupling=coupling, backend=backend)
        for x in (mask, mask.expand(2, 4, 5).clone())
    )
    assert_close(small, full)


def test_weight_shared_by_all_pairs_takes_j_from_logits_else_from_bias(backend):
    u, weight = torch.randn(2, 5, 3), torch.randn(4, 3)
    assert capsroute.capsule_linear(u, weight, logits=torch.randn(5, 7), backend=backend).shape == (2, 7, 4)
    assert capsroute.capsule_linear(u, weight, bias=torch.randn(6, 4), backend=backend).shape == (2, 6, 4)


def test_weight_shared_by_all_pairs_takes_j_from_a_query_for_all_samples(backend):
    u, weight, query = torch.randn(2, 5, 3), torch.randn(4, 3), torch.randn(6, 4)
    expected = capsroute.routing_pass(u, weight, query.expand(2, 6, 4), backend=backend)
    assert torch.equal(capsroute.routing_pass(u, weight, query, backend=backend), expected)


@with_coupling
@pytest.mark.parametrize("parameters", ["own", "float32"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_have_the_dtype_of_u_and_gradients_each_tensors_own(backend, coupling, dtype, parameters):
    parameters = torch.float32 if parameters == "float32" else dtype
    problem = random_problem(bias=True, logits="IJ", dtype=dtype, parameters=parameters, coupling=coupling)
    v, c = problem.run(backend, return_coupling=True)
    assert v.dtype == c.dtype == dtype
    grads = problem.gradients(backend)
    assert {name: x.dtype for name, x in problem.tensors.items()} == {
        name: grads[name].dtype for name in problem.tensors
    }


def test_the_scale_is_not_rounded_with_the_query(backend):
    u, weight, query = (torch.randn(shape).bfloat16() for shape in ((2, 5, 3), (5, 6, 4, 3), (2, 6, 4)))
    found = capsroute.routing_pass(u, weight, query, scale=0.7, backend=backend)
    assert torch.equal(found, capsroute.routing_pass(u, weight, 0.7 * query.float(), backend=backend))


@pytest.mark.parametrize("return_coupling", [False, True])
def test_a_pass_without_a_query_has_the_dtype_of_u(backend, return_coupling):
    u, weight = torch.randn(2, 5, 3).bfloat16(), torch.randn(5, 6, 4, 3).bfloat16()
    results = capsroute.routing_pass(u, weight, None, return_coupling=return_coupling, backend=backend)
    assert {x.dtype for x in (results if return_coupling else [results])} == {torch.bfloat16}


@pytest.fixture
def flushed():
    """Denormal float32 numbers count as 0."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("kind", ["contiguous", "strided", "masked"])
def test_small_float16_numbers_are_no_denormal_ones(backend, flushed, kind):
    u = torch.full((2, 3, 5), 3e-5, dtype=torch.float16)  # denormal in float16 alone
    u = torch.stack([u, u], -1)[..., 0] if kind == "strided" else u
    mask = torch.ones(2, 3, dtype=torch.bool) if kind == "masked" else None
    weight = torch.ones(3, 2, 4, 5, dtype=torch.float16)
    s = capsroute.routing_pass(u, weight, None, mask=mask, backend=backend)
    assert_close(s, (u.double().sum((1, 2)) / 2).half()[:, None, None].expand(2, 2, 4), rtol=1e-3, atol=0)
