"""First and second derivatives of the fused backends against finite differences, in float64."""

import pytest
import torch
from problems import FORMS, OPTIONS, cases, random_problem
from torch.autograd import gradcheck, gradgradcheck

# A detached coupling moves with the input but has no derivative, so finite differences cannot check it;
# test_contract.py differentiates the last weighted sum instead.
DIFFERENTIABLE = {name: options for name, options in OPTIONS.items() if not options.get("detach_coupling")}

# B, I, D, J, O: alone, and one past vectors of 4 and 8, blocks of 4 samples and groups of 64 input capsules.
SIZES = [(1, 1, 1, 1, 1), (5, 9, 3, 3, 5), (3, 17, 5, 2, 8), (4, 7, 8, 9, 3), (2, 65, 2, 5, 9)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("form", "options"), cases(DIFFERENTIABLE))
def test_gradients_agree_with_finite_differences(fused, form, options, sizes):
    function, tensors = random_problem(sizes, form=form, **OPTIONS[options]).as_function(fused)
    assert gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_every_element_of_the_jacobian(fused, form):
    function, tensors = random_problem((2, 5, 3, 3, 5), form=form, **OPTIONS["all"]).as_function(fused)
    assert gradcheck(function, tensors)


@pytest.mark.parametrize("name", ["u", "weight", "votes", "bias", "logits"])
def test_gradient_of_one_tensor_alone(fused, name):
    """Each combination of wanted gradients takes its own way through the backward."""
    form = "votes" if name == "votes" else "ijod"
    problem = random_problem((3, 9, 3, 3, 5), form=form, bias=True, logits="BIJ", mask="BI", leaky=True)
    every, alone = problem.gradients(fused), problem.gradients(fused, wanted=[name])
    torch.testing.assert_close(alone[name], every[name], rtol=1e-12, atol=1e-12)


TWICE = {name: OPTIONS[name] for name in ["one pass", "leaky", "bias", "logits of the layer", "all"]}


@pytest.mark.parametrize(("form", "options"), cases(TWICE))
def test_second_derivatives_agree_with_finite_differences(fused, form, options):
    function, tensors = random_problem((2, 3, 2, 2, 3), form=form, **OPTIONS[options]).as_function(fused)
    assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("options", ["detach", "all, detached"])
def test_second_derivatives_with_detached_coupling_are_the_references(fused, options):
    problem = random_problem((2, 3, 2, 2, 3), **OPTIONS[options])
    second = []
    for backend in (fused, "reference"):
        function, tensors = problem.as_function(backend)
        first = torch.autograd.grad(function(*tensors).square().sum(), tensors[:3], create_graph=True)
        second.append(torch.autograd.grad(sum(x.square().sum() for x in first), tensors[:3]))
    for found, expected in zip(*second, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
