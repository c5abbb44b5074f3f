"""What is computed, saved and allocated: only what is asked for, and never the votes of more than a few samples."""

import itertools
import os

import peak
import pytest
import torch
from calls import Calls
from problems import FORMS, Problem, cotangent, random_problem

import capsroute
from capsroute import functional


def test_a_call_after_one_without_memory_is_right(cpu):
    u, weight = torch.randn(3, 5, 4), torch.randn(5, 3, 16, 4)
    expected = capsroute.capsule_linear(u, weight, backend=cpu)
    zeros = torch.zeros(1)
    with pytest.raises(RuntimeError, match="bytes of scratch"):
        capsroute.capsule_linear(zeros.expand(1, 10**4, 10**4), zeros.expand(10**4, 1000, 1000, 10**4), backend=cpu)
    assert torch.equal(capsroute.capsule_linear(u, weight, backend=cpu), expected)


def test_sizes_whose_products_overflow_are_an_error(cpu):
    """An expanded tensor may have any size."""
    one = torch.ones(1)
    u, weight = one.expand(1, 3, 2**57), one.expand(3, 2, 1, 2**57)
    with pytest.raises(RuntimeError, match="B I D J O must be less than 2\\^50"):
        capsroute.capsule_linear(u, weight, backend=cpu)


@pytest.mark.parametrize("coupling", ["out", "in"])
@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("form", ["jod", "od"])
def test_rows_that_lie_apart_do_not_mix(cpu, form, outputs, coupling):
    """Rows of 256 numbers lie apart, so as not to share lines of a cache; those of a forbidden pair are moved."""
    problem = random_problem((2, 9, 256, outputs, 8), form=form, logits="IJ", coupling=coupling, dtype=torch.float32)
    problem.tensors["logits"][3] = -torch.inf
    problem.tensors["u"][:, 3] = 0
    expected = problem.gradients(cpu)
    problem.tensors["u"][:, 3] = torch.nan
    found = problem.gradients(cpu)
    assert torch.equal(found["v"], expected["v"])
    assert torch.equal(found["u"], expected["u"])


def test_logits_that_all_samples_share_are_not_copied_for_two_leading_dimensions():
    shared = torch.zeros(1, 1, 7, 4)
    assert functional._flatten_lead(shared, [20, 30], 2).shape == (1, 7, 4)


@pytest.mark.parametrize("without", ["requires_grad", "no_grad", "inference_mode"])
def test_nothing_is_saved_when_no_gradient_is_wanted(fused, without):
    problem = random_problem(bias=True, logits="BIJ").map(lambda x: x.requires_grad_(without != "requires_grad"))
    mode = torch.enable_grad if without == "requires_grad" else getattr(torch, without)
    with mode(), Calls() as calls:
        v = problem.run(fused)
    assert not v.requires_grad
    ((_, *others),) = calls.results["route"]
    assert [x.numel() for x in others] == [0, 0, 0, 0, 0]


# [R, B, J, O]; of a constant coupling [1, B, J, O] and the last logits [B, I, J]
@pytest.mark.parametrize(("detach", "expected"), [(False, [(3, 6, 3, 4)]), (True, [(1, 6, 3, 4), (6, 5, 3)])])
def test_what_is_saved_is_the_inputs_and_s(fused, detach, expected):
    problem = random_problem((6, 5, 3, 3, 4), bias=True, logits="BIJ", iterations=3, detach_coupling=detach)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        problem.map(lambda x: x.requires_grad_()).run(fused)
    inputs = {x.data_ptr() for x in problem.tensors.values()}
    assert [x.shape for x in saved if x.numel() and x.data_ptr() not in inputs] == expected


@pytest.mark.skipif(os.environ.get("CAPSROUTE_NO_EXT") == "1", reason="CAPSROUTE_NO_EXT=1: there are no kernels")
class TestVotesOfAFew:
    """All the weight would be read again for them alone: the CPU kernels leave them to the backward, up to 12 MiB."""

    @pytest.mark.parametrize(
        ("sizes", "options", "numbers"),
        [
            ((1, 70, 3, 5, 7), {}, 128 * (5 * 16 + 16)),
            ((4, 70, 3, 5, 17), {}, 4 * 128 * (5 * 32 + 16)),
            ((4, 6000, 1, 9, 16), {}, 3 << 20),
            ((5, 70, 3, 5, 7), {}, 0),
            ((4, 70, 3, 5, 7), {"iterations": 1}, 0),
            ((4, 70, 3, 5, 7), {"detach_coupling": True}, 0),
        ],
    )
    def test_room_for_them(self, sizes, options, numbers):
        problem = random_problem(sizes, form="ijod", dtype=torch.float32, **options)
        with Calls() as calls:
            problem.map(lambda x: x.requires_grad_()).run("cpu")
        ((*_, votes, _),) = calls.results["route"]
        assert votes.numel() == numbers

    @pytest.mark.parametrize("groups", [1, 2, 3])
    @pytest.mark.parametrize("coupling", ["out", "in"])
    def test_gradients_have_the_bits_of_votes_made_anew(self, coupling, groups):
        """Of 130 input capsules, which are three groups."""
        problem = random_problem(
            (3, 130, 3, 5, 7), form="ijod", logits="BIJ", forbid=True, mask="BI", coupling=coupling
        )
        tensors = [*(problem.tensors.get(name) for name in NAMES), problem.mask]
        given = (*tensors, 3, coupling == "in", False, 1e-9)
        ops = torch.ops.capsroute
        v, s, norm, _, votes, _ = ops.route(*given, 3, 3 * 64 * groups * (5 * 8 + 16), False)
        needs = (True, True, False, True)

        def gradients(votes):
            return ops.route_backward(cotangent(v), s, norm, votes, *given, False, *needs)

        anew = gradients(votes[:0])
        for found, expected in zip(gradients(votes), anew, strict=True):
            assert torch.equal(found, expected)
        assert gradients(torch.full_like(votes, torch.nan))[0].isnan().any()  # so they are not made anew


NAMES = ("u", "weight", "bias", "logits")


@pytest.mark.parametrize("wanted", [s for n in (1, 2, 3, 4) for s in itertools.combinations(NAMES, n)], ids="-".join)
def test_only_wanted_gradients_are_computed(fused, wanted):
    problem = random_problem(bias=True, logits="BIJ")
    expected = problem.gradients("reference")
    with Calls() as calls:
        found = problem.gradients(fused, wanted=wanted)
    ((*computed,),) = calls.results["route_backward"]
    assert [name for name, x in zip(NAMES, computed, strict=True) if x.numel()] == list(wanted)
    for name in wanted:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("coupling", ["out", "in"])
@pytest.mark.parametrize("wanted", [("u",), ("weight",), ("query",), ("logits",), ("u", "query")], ids="-".join)
def test_only_wanted_gradients_of_a_pass_are_computed(fused, wanted, coupling):
    problem = random_problem(query="BJO", logits="BIJ", coupling=coupling)
    expected = problem.gradients("reference")
    with Calls() as calls:
        found = problem.gradients(fused, wanted=wanted)
    ((*computed,),) = calls.results["routing_pass_backward"]
    names = ("u", "weight", "query", "logits")
    assert [name for name, x in zip(names, computed, strict=True) if x.numel()] == list(wanted)
    for name in wanted:
        torch.testing.assert_close(found[name], expected[name])


def test_detached_coupling_computes_no_gradient_of_logits(fused):
    problem = random_problem(bias=True, logits="BIJ", detach_coupling=True)
    with Calls() as calls:
        problem.gradients(fused)
    ((*_, dlogits),) = calls.results["route_backward"]
    assert dlogits.numel() == 0


MIB = 2**20


def extra_memory(problem: Problem, backend: str) -> int:
    """Of forward + backward; v and the gradients are kept."""
    return peak.extra_memory(lambda: problem.gradients(backend).values())


@pytest.mark.not_interpreted
def test_extra_memory_is_a_small_part_of_the_references(fused, one_thread):
    problem = random_problem((128, 1152, 8, 10, 16), dtype=torch.float32)
    problem.tensors["weight"] = problem.tensors["weight"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert extra_memory(problem, fused) < 0.08 * extra_memory(problem, "reference")


@pytest.mark.not_interpreted
@pytest.mark.parametrize("form", FORMS)
def test_scratch_is_smaller_than_the_logits(fused, one_thread, form):
    batch, inputs, outputs = 256, 256, 256
    problem = random_problem((batch, inputs, 2, outputs, 2), form=form, dtype=torch.float32, bias=True, logits="IJ")
    assert batch * inputs * outputs * 4 == 64 * MIB
    assert extra_memory(problem, fused) < 48 * MIB  # chunks of at most 32, and what has no factor B * I
