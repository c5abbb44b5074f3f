"""The fused operator under torch.func and forward mode, autocast, GradScaler, checkpoint and gradient penalties."""

import itertools

import pytest
import torch
from problems import FORMS, Problem, random_problem
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import capsroute
from capsroute import functional

EVERYTHING = {"bias": True, "logits": "BIJ", "mask": "BI"}


# torch.func


def function_of(problem: Problem, fused: str):
    function, tensors = problem.as_function(fused)
    return function, tuple(x.detach() for x in tensors)


@pytest.mark.parametrize("form", FORMS)
def test_func_grad_is_autograd(fused, form):
    problem = random_problem((4, 9, 3, 3, 5), form=form, **EVERYTHING)
    function, tensors = function_of(problem, fused)
    found = torch.func.grad(lambda *x: function(*x).square().sum(), tuple(range(len(tensors))))(*tensors)
    leaves = [x.clone().requires_grad_() for x in tensors]
    for x, y in zip(found, torch.autograd.grad(function(*leaves).square().sum(), leaves), strict=True):
        assert_close(x, y)


NAMES = ("u", "weight", "bias", "logits")
SUBSETS = [subset for n in range(1, 5) for subset in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize("mapped", SUBSETS, ids="-".join)
def test_vmap_over_any_subset_equals_a_loop(fused, mapped):
    problem = random_problem((3, 5, 2, 3, 4), **EVERYTHING)
    function, tensors = function_of(problem, fused)
    dims = [NAMES.index(name) % 2 if name in mapped else None for name in NAMES]  # some of them not in front
    stacked = [torch.stack([x, -x, 2 * x], dim) if dim is not None else x for x, dim in zip(tensors, dims, strict=True)]

    def at(n):
        return [x if dim is None else x.select(dim, n) for x, dim in zip(stacked, dims, strict=True)]

    assert_close(torch.vmap(function, tuple(dims))(*stacked), torch.stack([function(*at(n)) for n in range(3)]))

    def gradients(*x):
        return torch.func.grad(lambda *x: function(*x).square().sum(), (0, 1, 2, 3))(*x)

    loop = [gradients(*at(n)) for n in range(3)]
    for x, *parts in zip(torch.vmap(gradients, tuple(dims))(*stacked), *loop, strict=True):
        assert_close(x, torch.stack(parts))


@pytest.mark.parametrize("mapped", [("u",), ("query",), ("weight", "query"), ("u", "weight", "logits", "query")])
def test_vmap_of_a_pass_equals_a_loop(fused, mapped):
    problem = random_problem((3, 5, 2, 3, 4), query="BJO", logits="BIJ", mask="BI")
    function, tensors = function_of(problem, fused)
    dims = tuple(0 if name in mapped else None for name in problem.tensors)
    stacked = [x if dim is None else torch.stack([x, -x, 2 * x]) for x, dim in zip(tensors, dims, strict=True)]
    gradient = torch.func.grad(lambda *x: function(*x).square().sum(), tuple(range(len(tensors))))
    for call in (lambda *x: (function(*x),), gradient):
        loop = [call(*(x if dim is None else x[n] for x, dim in zip(stacked, dims, strict=True))) for n in range(3)]
        for x, *parts in zip(torch.vmap(call, dims)(*stacked), *loop, strict=True):
            assert_close(x, torch.stack(parts))


@pytest.mark.parametrize("mapped", [("u",), ("weight",), NAMES], ids="-".join)
def test_vmap_over_nothing(fused, mapped):
    function, tensors = function_of(random_problem((3, 5, 2, 3, 4), **EVERYTHING), fused)
    dims = tuple(NAMES.index(name) % 2 if name in mapped else None for name in NAMES)
    empty = [x if dim is None else x.unsqueeze(dim).narrow(dim, 0, 0) for x, dim in zip(tensors, dims, strict=True)]
    assert torch.vmap(function, dims)(*empty).shape == (0, *function(*tensors).shape)


def test_vmap_over_no_samples_in_another_dimension(fused):
    weight = torch.randn(5, 3, 2, 4)
    v = torch.vmap(lambda u: capsroute.capsule_linear(u, weight, backend=fused), in_dims=1)(torch.zeros(6, 0, 5, 4))
    assert v.shape == (0, 6, 3, 2)


def test_vmap_over_the_mask_and_over_votes(fused):
    votes, mask = torch.randn(4, 2, 5, 3, 4), torch.rand(4, 2, 5) < 0.7

    def route(votes, mask):
        return capsroute.dynamic_routing(votes, mask=mask, backend=fused)

    for dims in [(0, 0), (0, None), (None, 0)]:
        arguments = [x if dim == 0 else x[0] for x, dim in zip((votes, mask), dims, strict=True)]
        expected = [route(votes[n if dims[0] == 0 else 0], mask[n if dims[1] == 0 else 0]) for n in range(4)]
        assert_close(torch.vmap(route, dims)(*arguments), torch.stack(expected))


def test_gradients_per_sample_equal_a_loop(fused):
    u, weight = torch.randn(6, 9, 4).double(), torch.randn(9, 3, 5, 4).double()

    def loss(weight, u):
        return capsroute.capsule_linear(u, weight, backend=fused).norm(dim=-1).sum()

    gradient = torch.func.grad(loss)

    found = torch.vmap(gradient, (None, 0))(weight, u)
    assert_close(found, torch.stack([gradient(weight, sample) for sample in u]))


def test_jacrev_equals_a_loop(fused):
    function, tensors = function_of(random_problem((2, 3, 2, 2, 3), bias=True), fused)
    found = torch.func.jacrev(function, (0, 1, 2))(*tensors)
    leaves = [x.clone().requires_grad_() for x in tensors]
    v = function(*leaves)
    rows = [torch.autograd.grad(element, leaves, retain_graph=True) for element in v.flatten()]
    for jacobian, *parts in zip(found, *rows, strict=True):
        assert_close(jacobian.flatten(0, v.dim() - 1), torch.stack(parts))


@pytest.mark.parametrize("options", [{"bias": True}, {"query": "BJO"}], ids=str)
def test_autograd_of_a_pullback_after_its_transformation_ended(fused, options):
    problem = random_problem((2, 3, 2, 2, 3), **options)
    second = []
    for backend in (fused, "reference"):
        function, leaves = problem.as_function(backend)
        v, pullback = torch.func.vjp(function, *leaves)
        first = pullback(v)
        second.append(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))
    for found, expected in zip(*second, strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad])
def test_forward_mode_refuses_rather_than_lose_the_tangent(fused, name, grad_mode):
    problem = random_problem(**EVERYTHING)
    function, tensors = function_of(problem, fused)
    at = list(problem.tensors).index(name)

    def alone(x):
        return function(*tensors[:at], x, *tensors[at + 1 :])

    def dual(x):
        with torch.autograd.forward_ad.dual_level():
            v = alone(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            return torch.autograd.forward_ad.unpack_dual(v).tangent

    for forward_mode in (dual, torch.func.jacfwd(alone), lambda x: torch.func.jvp(alone, (x,), (torch.ones_like(x),))):
        with grad_mode(), pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
            forward_mode(tensors[at])


# Training tools


@pytest.mark.parametrize("form", FORMS)
def test_autocast_casts_u_weight_and_votes_alone(fused, form):
    problem = random_problem((4, 9, 3, 3, 5), form=form, dtype=torch.float32, bias=True, logits="BIJ")
    cast = {name: x if name in ("bias", "logits") else x.bfloat16() for name, x in problem.tensors.items()}
    expected = Problem(cast).gradients(fused)
    with torch.autocast("cpu", torch.bfloat16):
        found = problem.gradients(fused)
    assert found["v"].dtype == torch.bfloat16
    assert torch.equal(found["v"], expected["v"])
    for name in problem.tensors:
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected[name].float()), name


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_computes_in_full_precision_under_autocast(form):
    problem = random_problem((4, 9, 3, 3, 5), form=form, dtype=torch.float32, bias=True, logits="BIJ")
    cast = {name: x if name in ("bias", "logits") else x.bfloat16() for name, x in problem.tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        v = problem.run("reference")
    assert torch.equal(v, Problem(cast).run("reference"))


def test_autocast_leaves_float64_alone(fused):
    problem = random_problem()
    expected = problem.run(fused)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(problem.run(fused), expected)


def test_autocast_of_mixed_dtypes(fused):
    problem = random_problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.float16):
        v = capsroute.capsule_linear(problem.tensors["u"].half(), problem.tensors["weight"], backend=fused)
    assert torch.equal(v, problem.map(torch.Tensor.half).run(fused))


def test_grad_scaler(fused):
    u, weight = torch.randn(4, 9, 3), torch.randn(9, 3, 5, 3)
    steps = []
    for scaler in (torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu", enabled=False)):
        parameter = torch.nn.Parameter(weight.clone())
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        with torch.autocast("cpu", torch.float16):
            loss = capsroute.capsule_linear(u, parameter, backend=fused).float().norm(dim=-1).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append(parameter.detach())
    assert not torch.equal(steps[0], weight)
    assert_close(steps[0], steps[1], rtol=1e-3, atol=1e-3)


def test_inference_mode(fused):
    problem = random_problem(**EVERYTHING)
    with torch.inference_mode():
        v = problem.run(fused)
    assert v.is_inference()
    assert torch.equal(v, problem.run(fused))


@pytest.mark.parametrize(("form", "leaky"), [("ijod", False), ("jod", True), ("votes", False)])
def test_the_result_of_a_pass_may_be_changed_in_place(fused, form, leaky):
    problem = random_problem(form=form, query="BJO", logits="BIJ", mask="BI", leaky=leaky)
    function, tensors = problem.as_function(fused)
    expected = torch.autograd.grad(function(*tensors).square().sum(), tensors)
    s = function(*tensors)
    twice = 2 * s.detach()
    s.add_(1)
    for x, y in zip(torch.autograd.grad(s, tensors, twice), expected, strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(fused, use_reentrant):
    function, tensors = random_problem((4, 9, 3, 3, 5), **EVERYTHING).as_function(fused)
    plain = torch.autograd.grad(function(*tensors).square().sum(), tensors)
    checkpoint(function, *tensors, use_reentrant=use_reentrant).square().sum().backward()
    for x, grad in zip(tensors, plain, strict=True):
        assert torch.equal(x.grad, grad)


def test_gradient_penalty(fused):
    problem = random_problem((4, 9, 3, 3, 5), **EVERYTHING)
    for found, expected in zip(penalty_gradients(problem, fused), penalty_gradients(problem, "reference"), strict=True):
        assert_close(found, expected)


def test_second_backward_is_computed_in_full_precision_under_autocast(fused):
    problem = random_problem((4, 9, 3, 3, 5), dtype=torch.float32, **EVERYTHING)
    with torch.autocast("cpu", torch.bfloat16):
        found = penalty_gradients(problem, fused)
    for x, y in zip(found, penalty_gradients(problem, fused), strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("options", [EVERYTHING, {"query": "BJO"}], ids=str)
def test_gradient_penalty_under_hooks_on_saved_tensors(fused, options):
    problem = random_problem((4, 9, 3, 3, 5), **options)
    expected = penalty_gradients(problem, fused)
    with torch.autograd.graph.save_on_cpu():
        assert_close(penalty_gradients(problem, fused), expected)
    function, tensors = problem.as_function(fused)

    def penalty(*tensors):
        (du,) = torch.autograd.grad(function(*tensors).norm(dim=-1).sum(), tensors[0], create_graph=True)
        return du.square().sum()

    assert_close(torch.autograd.grad(checkpoint(penalty, *tensors, use_reentrant=False), tensors), expected)


@pytest.mark.parametrize("options", [EVERYTHING, {"query": "BJO"}], ids=str)
def test_third_derivatives(fused, options):
    problem = random_problem((2, 5, 3, 3, 4), **options)
    third = []
    for backend in (fused, "reference"):
        function, tensors = problem.as_function(backend)
        loss = function(*tensors).square().sum()
        for _ in range(3):
            grads = torch.autograd.grad(loss, tensors, create_graph=True)
            loss = sum(x.square().sum() for x in grads)
        third.append(grads)
    assert_close(*third)


def penalty_gradients(problem: Problem, backend: str) -> tuple[Tensor, ...]:
    function, tensors = problem.as_function(backend)
    with torch.autocast("cpu", enabled=False):
        v = function(*tensors)
    (du,) = torch.autograd.grad(v.norm(dim=-1).sum(), tensors[0], create_graph=True)
    return torch.autograd.grad(du.square().sum(), tensors)


def test_traced_with_symbolic_sizes(fused):
    problem = random_problem((3, 5, 4, 3, 2), dtype=torch.float64)

    def routed(u, weight):
        return capsroute.capsule_linear(u, weight, backend=fused)

    u, weight = problem.tensors["u"].detach(), problem.tensors["weight"].detach()
    traced = make_fx(routed, tracing_mode="symbolic")(u, weight)
    more = u.repeat(2, 1, 1)
    assert_close(traced(more, weight), routed(more, weight))


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", [EVERYTHING, {"query": "BJO"}], ids=str)
def test_a_traced_call_has_gradients(fused, options):
    function, tensors = random_problem((4, 9, 3, 3, 5), **options).as_function(fused)
    traced = torch.jit.trace(function, tuple(tensors))  # which traces once more without gradients to check
    found, expected = (torch.autograd.grad(f(*tensors).square().sum(), tensors) for f in (traced, function))
    assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_call_takes_another_batch(fused):
    problem = random_problem((4, 9, 3, 3, 5), bias=True)
    function, tensors = function_of(problem, fused)
    function(*tensors)
    known = len(functional._sizes)
    with torch.no_grad():
        traced = torch.jit.trace(lambda u: function(u, *tensors[1:]), (tensors[0],))
        assert len(functional._sizes) == known  # those of a trace are tensors, and never found again
        more = torch.cat([tensors[0], tensors[0]])
        assert_close(traced(more), function(more, *tensors[1:]))
