"""The same inputs give the same bits: on any number of threads, alone or in a batch, from two threads at once."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from judge import Results, results
from problems import FORMS, LARGE, Problem, cotangent, fit, random_problem

import capsroute

# Enough samples, groups of input capsules and output capsules for every kernel to split its work.
SIZES = (13, 300, 8, 10, 16)


OPTIONS = {
    "plain": {},
    "all": {"bias": True, "logits": "IJ", "mask": "BI", "leaky": True},
    "in": {"bias": True, "logits": "IJ", "mask": "BI", "coupling": "in"},
    "pass": {"query": "BJO", "logits": "IJ"},
    "pass, in": {"query": "BJO", "mask": "BI", "coupling": "in"},
}


def assert_same_bits(found: Results, expected: Results) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_same_bits_on_any_number_of_threads(fused, threads, form, options, dtype):
    options = {"bias": True} if form == "od" and not options else options
    problem = random_problem(SIZES, form=form, dtype=dtype, **options)
    threads(1)
    expected = results(problem, fused)
    for count in (2, 3, 5):
        threads(count)
        assert_same_bits(results(problem, fused), expected)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("logits", [None, "IJ"])
@pytest.mark.parametrize("sizes", LARGE.values(), ids=LARGE)
def test_same_bits_on_any_number_of_threads_at_large_sizes(fused, threads, sizes, logits):
    problem = random_problem(sizes, dtype=torch.float32, logits=logits)
    threads(1)
    expected = results(problem, fused)
    for count in (2, 3):
        threads(count)
        assert_same_bits(results(problem, fused), expected)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("options", [{}, {"mask": "BI", "leaky": True}, {"logits": "IJ"}, {"coupling": "in"}], ids=str)
@pytest.mark.parametrize("sizes", [(3, 200, 32, 8, 32), (40, 100, 5, 4, 16), (2, 7, 3, 5, 3)], ids=str)
def test_looking_at_the_coupling_changes_no_bits(fused, sizes, options, iterations):
    problem = random_problem(sizes, dtype=torch.float32, iterations=iterations, **options)
    v, c = problem.run(fused, return_coupling=True)
    assert torch.equal(v, problem.run(fused))
    torch.testing.assert_close(c, problem.run("reference", return_coupling=True)[1])


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("sizes", [(1, 50, 9, 4, 16), (4, 64, 8, 3, 17), (7, 20, 4, 2, 16)])
def test_same_bits_where_threads_have_no_group_and_share_out_the_making_of_votes(cpu, threads, sizes, options, dtype):
    problem = random_problem(sizes, dtype=dtype, **options)
    threads(1)
    expected = results(problem, cpu)
    for count in (2, 3, 8):
        threads(count)
        assert_same_bits(results(problem, cpu), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_sample_has_the_same_bits_alone_where_sums_are_made_by_parts(cpu, dtype):
    """Of a batch, as its weight leaves the cache, and its rows are asked for along themselves: not of one sample."""
    problem = random_problem((6, 66, 8, 1100, 16), dtype=dtype)
    u, weight = problem.tensors["u"], problem.tensors["weight"]
    weight = weight.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # lies as the kernels read it
    v = capsroute.capsule_linear(u, weight, backend=cpu)
    for n in range(len(u)):
        assert torch.equal(capsroute.capsule_linear(u[n], weight, backend=cpu), v[n])


def test_same_bits_where_more_threads_make_the_coupling_anew_than_stream(cpu, threads):
    """One group of input capsules, streamed by one thread, has four blocks or more, shared out by four."""
    problem = random_problem((1, 64, 1, 25000, 1), dtype=torch.float32, iterations=4)
    threads(1)
    expected = results(problem, cpu)
    for count in (2, 3, 8):
        threads(count)
        assert_same_bits(results(problem, cpu), expected)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_same_bits_whether_a_weight_is_widened_once_or_for_each_tile(fused, threads, dtype):
    """Two tiles of samples: one thread widens the weight for both, two do it each for its own."""
    problem = random_problem((33, 70, 7, 5, 16), dtype=dtype, logits="IJ")
    threads(1)
    expected = results(problem, fused)
    threads(2)
    assert_same_bits(results(problem, fused), expected)


@pytest.mark.parametrize("options", [{"bias": True}, {"query": "BJO", "coupling": "in"}], ids=["route", "pass, in"])
@pytest.mark.parametrize(
    ("form", "sizes"), [*((form, SIZES) for form in FORMS), *(("ijod", sizes) for sizes in LARGE.values())]
)
def test_each_sample_has_the_same_bits_alone(fused, form, sizes, options):
    sizes = fit(fused, sizes)
    problem = random_problem(sizes, form=form, dtype=torch.float32, logits="BIJ", mask="BI", **options)
    per_sample = ("u", "votes", "query", "logits", "v")
    v, coupling = problem.run(fused, return_coupling=True)
    grad_v = cotangent(v)
    together = problem.gradients(fused, grad_v)
    for b in (0, 1, sizes[0] - 2):  # the last is masked out
        one = slice(b, b + 1)
        tensors = {name: x[one] if name in per_sample else x for name, x in problem.tensors.items()}
        alone = Problem(tensors, problem.mask[one], problem.options)
        assert torch.equal(alone.run(fused, return_coupling=True)[1], coupling[one])
        for name, value in alone.gradients(fused, grad_v[one]).items():
            assert name not in per_sample or torch.equal(value, together[name][one]), name


@pytest.mark.skipif(os.environ.get("CAPSROUTE_NO_EXT") == "1", reason="CAPSROUTE_NO_EXT=1: there are no kernels")
@pytest.mark.parametrize(
    ("dtype", "power"), [(torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, -130), (torch.float16, 0)]
)  # the third has subnormal u, which AVX512-BF16 takes for 0
# With AVX-512: kept by lanes of samples, by feature, by feature four at a time, not kept by lanes of samples, and kept
# in part by feature four at a time.
@pytest.mark.parametrize(
    "sizes",
    [(65, 70, 7, 5, 16), (17, 20, 6, 3, 33), (17, 130, 4, 10, 16), (17, 130, 3, 10, 16), LARGE["votes kept in part"]],
)
def test_each_sample_has_the_same_sums_alone(sizes, dtype, power):
    """The sums before squash, in float32: a result of low precision would hide another order of adding."""
    problem = random_problem(sizes, form="ijod", dtype=dtype)
    u, weight = (problem.tensors[name].detach().float() for name in ("u", "weight"))
    u, weight = (u * 2.0**power).to(dtype), (weight * 2.0 ** (-power // 4)).to(dtype)

    def sums(u: torch.Tensor) -> torch.Tensor:
        return torch.ops.capsroute.route(u, weight, None, None, None, 3, False, False, 1e-9, 3, 0, False)[1]

    together = sums(u)
    assert together.dtype == torch.float32
    for b in range(len(u)):
        assert torch.equal(sums(u[b : b + 1]), together[:, b : b + 1])


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# A weight in another order is multiplied as it lies, where that is for few samples, or brought into the kernels' order
# as it is read, or before; its gradient is made of vectors of D or of halves of them, or put into order once it is
# made, all at once or in the end, of sums of float64 or, where these would take more than 8 MiB, of those that lie
# where it goes.
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 70, 8, 3, 16),
        (1, 20, 28, 3, 32),
        (3, 20, 64, 4, 64),
        (8, 20, 20, 3, 16),
        (2, 20, 12, 3, 5),
        (4, 70, 8, 3, 24),
        (5, 70, 16, 3, 9),
        (40, 70, 8, 3, 16),
        (40, 70, 12, 3, 9),
        (300, 20, 8, 2, 16),
        (130, 1032, 8, 8, 16),
        *LARGE.values(),
    ],
)
def test_same_bits_in_every_memory_order_of_the_weight_and_with_rows_apart(cpu, sizes, dtype):
    problem = random_problem(sizes, dtype=dtype)
    expected = results(problem, cpu)
    for order, apart in itertools.product(("idjo", "ijdo", "jido", "ijod", "jiod", "doji"), (0, 3, 4)):
        weight = torch.einsum(f"ijod->{order}", problem.tensors["weight"])
        rows = torch.nn.functional.pad(weight, (0, apart), value=torch.nan).contiguous()
        weight = torch.einsum(f"{order}->ijod", rows[..., : weight.shape[-1]])
        assert_same_bits(results(Problem({**problem.tensors, "weight": weight}), cpu), expected)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("coupling", ["out", "in"])
@pytest.mark.parametrize("form", ["ijod", "jod"])
def test_a_gradient_has_the_same_bits_whatever_else_is_wanted(cpu, form, coupling):
    sizes = (57, 132, 9, 17, 8)  # in chunks, which what is kept for a gradient of the logits would make shorter
    problem = random_problem(sizes, form=form, dtype=torch.float32, bias=True, logits="IJ", coupling=coupling)
    expected = problem.gradients("cpu")
    for left_out in problem.tensors:
        wanted = [name for name in problem.tensors if name != left_out]
        found = problem.gradients("cpu", wanted=wanted)
        assert_same_bits({name: found[name] for name in wanted}, {name: expected[name] for name in wanted})


@pytest.mark.not_interpreted
def test_two_threads_may_call_at_once(fused):
    problems = [random_problem(SIZES, form=form, dtype=torch.float32, bias=True) for form in FORMS]
    expected = [results(problem, fused) for problem in problems]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            for found, bits in zip(pool.map(lambda p: results(p, fused), problems), expected, strict=True):
                assert_same_bits(found, bits)
