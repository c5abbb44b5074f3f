"""The fused backends against the reference: value, coupling and every gradient, at telling shapes and layouts."""

import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from judge import assert_as_exact_as_the_reference
from problems import EVERY, FORMS, LARGE, Problem, cases, cotangent, fit, random_problem

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "options"), cases(EVERY))
def test_every_option(fused, form, options, dtype):
    problem = random_problem(fit(fused, (5, 67, 5, 3, 9)), form=form, dtype=dtype, **EVERY[options])
    assert_as_exact_as_the_reference(problem, fused)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", ["all", "pass, all", "pass, all, in"])
def test_bias_logits_and_query_in_float32(fused, options, form, dtype):
    options = {**EVERY[options], "parameters": torch.float32}
    problem = random_problem(fit(fused, (5, 67, 5, 3, 9)), form=form, dtype=dtype, **options)
    assert_as_exact_as_the_reference(problem, fused)


# The kernels take 4, 8 or 16 features or input capsules in a vector, 4 samples in a block and 64 input
# capsules in a group: alone, an odd prime, one less and one more than each.
SIZES = st.tuples(
    st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9]),  # B
    st.sampled_from([0, 1, 3, 7, 8, 9, 13, 15, 16, 17, 63, 64, 65, 129]),  # I
    st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17]),  # D
    st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31]),  # J
    st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 32, 33]),  # O
)


@pytest.mark.not_interpreted
@hypothesis.given(
    sizes=SIZES,
    case=st.sampled_from(cases(EVERY)),
    dtype=st.sampled_from(DTYPES),
    iterations=st.integers(1, 4),
)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_sizes_at_the_edges_of_vectors_and_blocks(fused, sizes, case, dtype, iterations):
    form, options = case[0], EVERY[case[1]]
    options = options if "query" in options else {**options, "iterations": iterations}
    problem = random_problem(sizes, form=form, dtype=dtype, **options)
    assert_as_exact_as_the_reference(problem, fused)


LARGE_OPTIONS = {name: {**EVERY[name], "iterations": 3} for name in ["all", "all, detached", "in, all"]}
LARGE_OPTIONS |= {name: EVERY[name] for name in ["pass, all", "pass, all, in"]}
LARGE_OPTIONS["no logits"] = {"mask": "BI", "leaky": True, "iterations": 3}  # the first pass couples all alike


@pytest.mark.not_interpreted
@pytest.mark.parametrize("options", LARGE_OPTIONS)
@pytest.mark.parametrize("form", ["ijod", "jod", "votes"])
@pytest.mark.parametrize("sizes", LARGE.values(), ids=LARGE)
def test_large_sizes(fused, sizes, form, options):
    problem = random_problem(sizes, form=form, dtype=torch.float32, **LARGE_OPTIONS[options])
    assert_as_exact_as_the_reference(problem, fused)


# B, I, D, J, O of operator.md's table, the batch and where need be I cut to what float64 votes fit in.
REAL = {
    "MNIST": (5, 1152, 8, 10, 16),
    "CIFAR-10": (2, 4096, 8, 10, 16),
    "DeepCaps": (2, 2560, 8, 10, 32),
    "EMNIST": (2, 1152, 8, 62, 16),
    "196 classes": (2, 242, 8, 196, 16),
    "ImageNet": (2, 49, 8, 1000, 16),
    "matrix capsules": (18, 288, 16, 32, 16),
    "ComiRec": (16, 50, 64, 4, 64),
    "Efficient-CapsNet": (16, 16, 8, 10, 16),
}


@pytest.mark.parametrize("sizes", REAL.values(), ids=REAL)
def test_float32_at_real_shapes(fused, sizes):
    iterations = 1 if sizes == REAL["Efficient-CapsNet"] else 3
    problem = random_problem(fit(fused, sizes), dtype=torch.float32, bias=True, iterations=iterations)
    assert_as_exact_as_the_reference(problem, fused)


@pytest.mark.parametrize("form", ["jod", "od"])
def test_float32_with_shared_weight_at_the_shape_of_mind(fused, form):
    sizes = fit(fused, (64, 50, 64, 8, 64))
    problem = random_problem(sizes, form=form, dtype=torch.float32, logits="BIJ", mask="BI")
    assert_as_exact_as_the_reference(problem, fused)


def test_float32_with_votes_at_the_shape_of_segcaps(fused):
    problem = random_problem(fit(fused, (512, 16, 0, 4, 32)), form="votes", dtype=torch.float32, bias=True)
    assert_as_exact_as_the_reference(problem, fused)


# Layouts


def permuted(x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The same values; in memory the dimensions lie in this order, the last one fastest."""
    return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])


def reordered(x: torch.Tensor) -> torch.Tensor:
    return permuted(x, tuple(reversed(range(x.dim()))))


def sliced(x: torch.Tensor) -> torch.Tensor:
    """The same values, every second element along each dimension of something larger, which holds NaN elsewhere."""
    larger = x.new_full([2 * n + 1 for n in x.shape], torch.nan)
    view = larger[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def expanded(x: torch.Tensor) -> torch.Tensor:
    """Other values: the first along the first dimension for all, with stride 0."""
    return x[:1].expand(x.shape)


@pytest.mark.parametrize("order", list(itertools.permutations("ijod")), ids="".join)
def test_weight_in_every_memory_order(fused, order):
    problem = random_problem(fit(fused, (5, 17, 3, 3, 9)), dtype=torch.float32)
    problem.tensors["weight"] = permuted(problem.tensors["weight"], tuple("ijod".index(d) for d in order))
    assert_as_exact_as_the_reference(problem, fused)


@pytest.mark.parametrize("order", ["idjo", "ijdo", "jido", "ijod", "jiod", "doji"])
@pytest.mark.parametrize("batch", [0, 2])
def test_the_gradient_of_a_weight_lies_as_the_weight_does(fused, batch, order):
    """Autograd would copy one that lies in another order than its parameter."""
    problem = random_problem((batch, 17, 3, 3, 9), dtype=torch.float32)
    weight = permuted(problem.tensors["weight"], tuple("ijod".index(d) for d in order))
    problem.tensors["weight"] = weight
    assert problem.gradients(fused)["weight"].stride() == weight.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [reordered, sliced, expanded])
@pytest.mark.parametrize("form", FORMS)
def test_inputs_of_any_strides(fused, form, layout, dtype):
    problem = random_problem(fit(fused, (5, 17, 3, 3, 9)), form=form, dtype=dtype, bias=True, logits="BIJ", mask="BI")
    mask = problem.mask if layout is sliced else layout(problem.mask)
    assert_as_exact_as_the_reference(Problem(problem.map(layout).tensors, mask), fused)


@pytest.mark.parametrize("layout", [lambda g: g.new_ones(()).expand(g.shape), expanded, sliced, reordered])
@pytest.mark.parametrize("form", FORMS)
def test_incoming_gradient_of_any_strides(fused, form, layout):
    problem = random_problem(fit(fused, (5, 17, 3, 3, 9)), form=form, dtype=torch.float32, bias=True)
    grad_v = layout(cotangent(problem.run(fused)))
    assert_as_exact_as_the_reference(problem, fused, grad_v)
