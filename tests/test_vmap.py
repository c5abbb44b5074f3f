"""The fused operator under torch.vmap, and the gradients of each sample that it comes to."""

import itertools

import hypothesis
import pytest
import torch
from calls import Calls
from hypothesis import strategies as st
from problems import EVERY, EVERYTHING, Problem, cases, detached, random_problem
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import capsroute

NAMES = ("u", "weight", "bias", "logits")
SUBSETS = [subset for n in range(1, 5) for subset in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize("mapped", SUBSETS, ids="-".join)
def test_vmap_over_any_subset_equals_a_loop(fused, mapped):
    problem = random_problem((3, 5, 2, 3, 4), **EVERYTHING)
    function, tensors = detached(problem, fused)
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
    function, tensors = detached(problem, fused)
    dims = tuple(0 if name in mapped else None for name in problem.tensors)
    stacked = [x if dim is None else torch.stack([x, -x, 2 * x]) for x, dim in zip(tensors, dims, strict=True)]
    gradient = torch.func.grad(lambda *x: function(*x).square().sum(), tuple(range(len(tensors))))
    for call in (lambda *x: (function(*x),), gradient):
        loop = [call(*(x if dim is None else x[n] for x, dim in zip(stacked, dims, strict=True))) for n in range(3)]
        for x, *parts in zip(torch.vmap(call, dims)(*stacked), *loop, strict=True):
            assert_close(x, torch.stack(parts))


@pytest.mark.parametrize("mapped", [("u",), ("weight",), NAMES], ids="-".join)
def test_vmap_over_nothing(fused, mapped):
    function, tensors = detached(random_problem((3, 5, 2, 3, 4), **EVERYTHING), fused)
    dims = tuple(NAMES.index(name) % 2 if name in mapped else None for name in NAMES)
    empty = [x if dim is None else x.unsqueeze(dim).narrow(dim, 0, 0) for x, dim in zip(tensors, dims, strict=True)]
    with torch.enable_grad():
        result = torch.vmap(function, dims)(*(x.requires_grad_() for x in empty))
        assert result.shape == (0, *function(*tensors).shape)
        grads = torch.autograd.grad(result.sum(), empty)
    assert all(x.shape == grad.shape and not grad.any() for x, grad in zip(empty, grads, strict=True))


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


KINDS = {
    "v": lambda f, which: f,
    "gradients": lambda f, which: torch.func.grad(lambda *x: f(*x).sin().sum(), which),
    "Jacobians": lambda f, which: torch.func.jacrev(lambda *x: f(*x).sin().sum(-1).flatten()[:3], which),
}


@pytest.mark.not_interpreted
@hypothesis.given(
    sizes=st.tuples(*(st.sampled_from(x) for x in ((1, 2, 3), (1, 3, 17), (1, 2, 5), (1, 2, 10), (1, 4, 17)))),
    case=st.sampled_from(cases(EVERY)),
    kind=st.sampled_from(list(KINDS)),
    levels=st.integers(1, 2),
    random=st.randoms(use_true_random=False),
)
@hypothesis.settings(max_examples=200, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_vmap_equals_that_of_the_reference(fused, sizes, case, kind, levels, random):
    """Over any of the tensors and the mask, in any dimension, once and nested."""
    problem = random_problem(sizes, form=case[0], **EVERY[case[1]])
    given = [problem.mask, *(x.detach() for x in problem.tensors.values())]
    dims = []
    for _ in range(levels):
        mapped = [x is not None and random.random() < 0.6 for x in given]
        mapped[1] |= not any(mapped)
        dims.append(tuple(random.randrange(x.dim() + 1) if y else None for x, y in zip(given, mapped, strict=True)))
        size = random.randint(1, 4)
        given = [x if dim is None else several(x, size, dim) for x, dim in zip(given, dims[-1], strict=True)]
    which = sorted(random.sample(range(1, len(given)), random.randint(1, len(given) - 1)))

    def results(backend):
        def run(mask, *tensors):
            return Problem(dict(zip(problem.tensors, tensors, strict=True)), mask, problem.options).run(backend)

        call = KINDS[kind](run, tuple(which))
        for level in dims:
            call = torch.vmap(call, level)
        return call(*given)

    assert_close(results(fused), results("reference"))


def several(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """Like x, side by side."""
    return torch.stack([x.roll(k, -1) if x.dtype == torch.bool else (1 - 0.3 * k) * x for k in range(size)], dim)


@pytest.mark.parametrize(
    ("mapped", "wrt", "size", "calls"),
    [
        ("u", "u", 3, (1, 1)),
        ("u", "weight", 1, (1, 1)),
        ("u", "weight", 3, (1, 4)),  # sums over three samples
        ("logits", "u", 3, (4, 1)),  # the forward would copy u, whose gradient is as large
        ("weight", "u", 3, (4, 4)),
        ("u weight", "weight", 1, (4, 4)),
    ],
)
def test_what_stays_apart_becomes_one_batch(fused, mapped, wrt, size, calls):
    """Which takes less time than one call for each."""
    shapes = {"u": (size, 9, 4), "weight": (9, 3, 5, 4), "logits": (size, 9, 3)}
    dims = [0 if name in mapped.split() else None for name in shapes]
    tensors = [
        torch.randn(shape if dim is None else (4, *shape)) for shape, dim in zip(shapes.values(), dims, strict=True)
    ]

    def loss(u, weight, logits):
        return capsroute.capsule_linear(u, weight, logits=logits, backend=fused).square().sum()

    with Calls() as made:
        torch.vmap(torch.func.grad(loss, list(shapes).index(wrt)), tuple(dims))(*tensors)
    assert (len(made.results["route"]), len(made.results["route_backward"])) == calls


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2)], ids=str)
def test_gradients_of_many_weights_lie_in_memory_as_they_do(fused, order):
    weights = torch.randn(3, 5, 3, 4, 2).permute(0, *(1 + d for d in order)).contiguous()
    weights = weights.permute(0, *(1 + order.index(d) for d in range(4))).requires_grad_()
    u = torch.randn(2, 5, 2)

    def loss(weight):
        return capsroute.capsule_linear(u, weight, backend=fused).square().sum()

    (found,) = torch.autograd.grad(torch.vmap(loss)(weights).sum(), weights)
    assert found.stride() == weights.stride()
    assert_close(found, torch.stack([torch.func.grad(loss)(weight) for weight in weights.detach()]))


# The gradients of each sample


def of_one_sample(problem: Problem, options: dict, backend: str):
    """The gradients of a loss of one sample, as a function of the mask and its tensors; and which to map over."""
    shapes = {"u": "BID", "votes": "BIJO", **options}
    dims = [0 if str(shapes.get(name)).startswith("B") else None for name in ("mask", *problem.tensors)]

    def loss(*given):
        mask, *x = (y if dim is None else y.unsqueeze(0) for y, dim in zip(given, dims, strict=True))
        tensors = dict(zip(problem.tensors, x, strict=True))
        return Problem(tensors, mask, problem.options).run(backend).square().sum()

    return torch.func.grad(loss, tuple(range(1, len(dims)))), tuple(dims)


@pytest.mark.parametrize(("form", "options"), cases(EVERY))
def test_gradients_per_sample_equal_a_loop(fused, form, options):
    problem = random_problem((3, 5, 2, 3, 4), form=form, **EVERY[options])
    gradients, dims = of_one_sample(problem, EVERY[options], fused)
    given = problem.mask, *problem.tensors.values()
    with Calls() as made:
        found = torch.vmap(gradients, dims)(*given)
    assert [len(calls) for calls in made.results.values()] == [1, 1]
    loop = [gradients(*(x if dim is None else x[b] for x, dim in zip(given, dims, strict=True))) for b in range(3)]
    of_none = torch.vmap(gradients, dims)(*(x if dim is None else x[:0] for x, dim in zip(given, dims, strict=True)))
    for x, none, *parts in zip(found, of_none, *loop, strict=True):
        assert_close(x, torch.stack(parts))
        assert none.shape == (0, *parts[0].shape)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2), (1, 0, 3, 2), (3, 2, 1, 0)], ids=str)
def test_gradients_per_sample_lie_in_memory_as_the_weight(fused, order):
    """The last of these orders is none that the kernels write."""
    weight = torch.randn(5, 3, 4, 2).permute(order).contiguous().permute([order.index(d) for d in range(4)])
    gradient = torch.func.grad(lambda weight, u: capsroute.capsule_linear(u, weight, backend=fused).square().sum())
    u = torch.randn(6, 1, 5, 2)
    found = torch.vmap(gradient, (None, 0))(weight, u)
    assert found.stride() == (weight.numel(), *weight.stride())
    assert_close(found, torch.stack([gradient(weight, x) for x in u]))
    assert torch.vmap(gradient, (None, 0))(weight, u[:0]).shape == (0, *weight.shape)


def test_gradients_per_sample_are_compiled_for_any_number_of_samples(fused):
    weight = torch.randn(9, 3, 5, 4)
    gradient = torch.vmap(
        torch.func.grad(lambda weight, u: capsroute.capsule_linear(u, weight, backend=fused).square().sum()), (None, 0)
    )
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gradient, backend=counter, dynamic=True, fullgraph=True)
    for size in (6, 7, 11):
        u = torch.randn(size, 1, 9, 4)
        assert_close(compiled(weight, u), gradient(weight, u))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("ijod", "all"),
        ("ijod", "logits of the layer"),
        ("jod", "detach"),
        ("od", "in, all"),
        ("votes", "pass, all"),
        ("ijod", "pass, one query"),
        ("jod", "pass, all, in"),
    ],
)
def test_derivatives_of_gradients_per_sample(fused, form, options):
    problem = random_problem((3, 5, 2, 3, 4), form=form, **EVERY[options])
    second = []
    for backend in (fused, "reference"):
        gradients, dims = of_one_sample(problem, EVERY[options], backend)

        def penalty(*tensors, gradients=gradients, dims=dims):
            return sum(x.square().sum() for x in torch.vmap(gradients, dims)(problem.mask, *tensors))

        tensors = tuple(problem.tensors.values())
        second.append(torch.func.grad(penalty, tuple(range(len(tensors))))(*tensors))
    for found, expected in zip(*second, strict=True):
        assert_close(found, expected)
