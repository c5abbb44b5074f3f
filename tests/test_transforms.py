"""The fused operator under torch.func and forward mode, autocast, GradScaler, checkpoint and gradient penalties."""

import pytest
import torch
from calls import Calls
from problems import EVERYTHING, FORMS, Problem, detached, random_problem
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import capsroute
from capsroute import functional

# torch.func


@pytest.mark.parametrize("form", FORMS)
def test_func_grad_is_autograd(fused, form):
    problem = random_problem((4, 9, 3, 3, 5), form=form, **EVERYTHING)
    function, tensors = detached(problem, fused)
    found = torch.func.grad(lambda *x: function(*x).square().sum(), tuple(range(len(tensors))))(*tensors)
    leaves = [x.clone().requires_grad_() for x in tensors]
    for x, y in zip(found, torch.autograd.grad(function(*leaves).square().sum(), leaves), strict=True):
        assert_close(x, y)


def test_jacrev_equals_a_loop(fused):
    function, tensors = detached(random_problem((2, 3, 2, 2, 3), bias=True), fused)
    found = torch.func.jacrev(function, (0, 1, 2))(*tensors)
    leaves = [x.clone().requires_grad_() for x in tensors]
    v = function(*leaves)
    rows = [torch.autograd.grad(element, leaves, retain_graph=True) for element in v.flatten()]
    for jacobian, *parts in zip(found, *rows, strict=True):
        assert_close(jacobian.flatten(0, v.dim() - 1), torch.stack(parts))
    with Calls() as made:
        assert_close(torch.func.jacrev(function)(*tensors), found[0])
    assert len(made.results["route_backward"]) == 1  # not one for each row


@pytest.mark.parametrize(
    "options", [{"bias": True}, {"query": "BJO"}, {"coupling": "in"}, {"detach_coupling": True}], ids=str
)
def test_gradients_side_by_side_keep_their_graph(fused, options):
    problem = random_problem((2, 3, 2, 2, 3), **options)
    second = []
    for backend in (fused, "reference"):
        function, leaves = problem.as_function(backend)
        v = function(*leaves)
        cotangents = torch.eye(v.numel(), dtype=v.dtype).reshape(-1, *v.shape)
        first = torch.autograd.grad(v, leaves, cotangents, is_grads_batched=True, create_graph=True)
        second.append(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))
    for found, expected in zip(*second, strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("coupling", ["out", "in"])
@pytest.mark.parametrize("options", [{}, {"query": "BJO"}], ids=str)
def test_saved_tensors_may_come_back_in_another_order(fused, options, coupling):
    function, leaves = random_problem((2, 3, 2, 2, 3), coupling=coupling, **options).as_function(fused)
    expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.transpose(0, -1).contiguous(), lambda x: x.transpose(0, -1)
    ):
        v = function(*leaves)
    for x, y in zip(torch.autograd.grad(v.square().sum(), leaves), expected, strict=True):
        assert_close(x, y)


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


@pytest.mark.parametrize("name", ["u", "weight", "bias", "logits"])
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad])
def test_forward_mode_refuses_rather_than_lose_the_tangent(fused, name, grad_mode):
    problem = random_problem(**EVERYTHING)
    function, tensors = detached(problem, fused)
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
def test_a_call_traced_above_autograd_has_gradients(fused):
    function, leaves = random_problem((3, 5, 2, 3, 3)).as_function(fused)
    traced = make_fx(function, pre_dispatch=True)(*leaves)
    v = traced(*leaves)
    assert torch.is_grad_enabled()
    for x, y in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (v, function(*leaves))), strict=True):
        assert_close(x, y)


def test_a_traced_call_takes_another_batch(fused):
    problem = random_problem((4, 9, 3, 3, 5), bias=True)
    function, tensors = detached(problem, fused)
    function(*tensors)
    known = len(functional._sizes)
    with torch.no_grad():
        traced = torch.jit.trace(lambda u: function(u, *tensors[1:]), (tensors[0],))
        assert len(functional._sizes) == known  # those of a trace are tensors, and never found again
        more = torch.cat([tensors[0], tensors[0]])
        assert_close(traced(more), function(more, *tensors[1:]))
