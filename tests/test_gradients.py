"""First and second derivatives of the fused backends against finite differences, in float64."""

import pytest
import torch
from problems import EVERY, FORMS, cases, fit, random_problem
from torch.autograd import gradcheck, gradgradcheck

# A detached coupling moves with the input but has no derivative, so finite differences cannot check it;
# test_contract.py differentiates the last weighted sum instead.
DIFFERENTIABLE = {name: options for name, options in EVERY.items() if not options.get("detach_coupling")}

# B, I, D, J, O: alone, and one past vectors of 4 and 8, blocks of 4 samples and groups of 64 input capsules.
SIZES = [(1, 1, 1, 1, 1), (5, 9, 3, 3, 5), (3, 17, 5, 2, 8), (4, 7, 8, 9, 3), (2, 65, 2, 5, 9)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("form", "options"), cases(DIFFERENTIABLE))
def test_gradients_agree_with_finite_differences(fused, form, options, sizes):
    function, tensors = random_problem(fit(fused, sizes), form=form, **EVERY[options]).as_function(fused)
    assert gradcheck(function, tensors, fast_mode=True)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("options", ["all", "in, all", "pass, all", "pass, all, in"])
@pytest.mark.parametrize("form", FORMS)
def test_every_element_of_the_jacobian(fused, form, options):
    function, tensors = random_problem((2, 5, 3, 3, 5), form=form, **EVERY[options]).as_function(fused)
    assert gradcheck(function, tensors)


@pytest.mark.parametrize("name", ["u", "weight", "votes", "bias", "query", "logits"])
@pytest.mark.parametrize("coupling", ["out", "in"])
def test_gradient_of_one_tensor_alone(fused, coupling, name):
    """Each combination of wanted gradients takes its own way through the backward."""
    options = {"query": "BJO"} if name == "query" else {"bias": True}
    form = "votes" if name == "votes" else "ijod"
    problem = random_problem((3, 9, 3, 3, 5), form=form, logits="BIJ", mask="BI", coupling=coupling, **options)
    every, alone = problem.gradients(fused), problem.gradients(fused, wanted=[name])
    torch.testing.assert_close(alone[name], every[name], rtol=1e-12, atol=1e-12)


TWICE = {
    name: EVERY[name]
    for name in ["one pass", "leaky", "bias", "logits of the layer", "all", "in, all", "pass", "pass, all, in"]
}


@pytest.mark.parametrize(("form", "options"), cases({name: EVERY[name] for name in TWICE}))
def test_second_derivatives_agree_with_finite_differences(fused, form, options):
    function, tensors = random_problem((2, 3, 2, 2, 3), form=form, **EVERY[options]).as_function(fused)
    assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("options", ["detach", "all, detached"])
def test_second_derivatives_with_detached_coupling_are_the_references(fused, options):
    problem = random_problem((2, 3, 2, 2, 3), **EVERY[options])
    second = []
    for backend in (fused, "reference"):
        function, tensors = problem.as_function(backend)
        first = torch.autograd.grad(function(*tensors).square().sum(), tensors[:3], create_graph=True)
        second.append(torch.autograd.grad(sum(x.square().sum() for x in first), tensors[:3]))
    for found, expected in zip(*second, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("logits", ["1IJ", "J"])
@pytest.mark.parametrize("form", FORMS)
def test_sums_over_a_long_batch_keep_their_digits(fused, form, logits):
    """Samples that are all alike, as a flat background's: one running sum loses the same digits with each of them."""
    if fused == "triton":
        pytest.skip("a few digits less: docs/gpu.md")
    one = random_problem((1, 3, 2, 3, 5), form=form, logits=logits, bias=True, dtype=torch.float32)
    many, count = one.map(lambda x: x), 50_000
    for name in {"u", "votes"} & many.tensors.keys():
        many.tensors[name] = one.tensors[name].expand(count, *one.tensors[name].shape[1:])
    grad_v = torch.arange(15.0).view(1, 3, 5)
    wanted = [name for name in one.tensors if name not in ("u", "votes")]
    alone = one.gradients(fused, grad_v, wanted)
    summed = many.gradients(fused, grad_v.expand(count, 3, 5), wanted)
    for name in wanted:
        torch.testing.assert_close(summed[name] / count, alone[name], rtol=3e-6, atol=3e-6)
