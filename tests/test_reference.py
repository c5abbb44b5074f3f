"""The reference against the definition in plain loops and against finite differences."""

import definition
import pytest
import torch
from problems import EVERY, Problem, cases, cotangent, random_problem
from torch.testing import assert_close

import capsroute


@pytest.mark.parametrize(("form", "options"), cases(EVERY))
def test_agrees_with_the_definition_in_loops(form, options):
    problem = random_problem((3, 5, 2, 3, 4), form=form, **EVERY[options])
    assert_agrees_with_the_definition(problem)


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("coupling", ["out", "in"])
def test_agrees_with_the_definition_at_every_number_of_iterations(iterations, coupling):
    problem = random_problem((2, 4, 2, 3, 3), bias=True, logits="BIJ", iterations=iterations, coupling=coupling)
    assert_agrees_with_the_definition(problem)


def assert_agrees_with_the_definition(problem: Problem) -> None:
    v, coupling = problem.run("reference", return_coupling=True)
    grad_v = cotangent(v)
    expected = definition.route(problem, grad_v.numpy())
    found = {**problem.gradients("reference", grad_v), "coupling": coupling}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "logits" and problem.options.get("detach_coupling"):
            assert found[name] is None
            assert not value.any()
        else:
            assert_close(found[name].numpy(), value, rtol=0, atol=1e-13)


@pytest.mark.parametrize("third", [{"bias": True}, {"query": "BJO", "scale": 2.0}], ids=lambda x: next(iter(x)))
@pytest.mark.parametrize("coupling", ["out", "in"])
@pytest.mark.parametrize("form", ["ijod", "jod", "od", "votes"])
def test_gradients_agree_with_finite_differences(form, coupling, third):
    problem = random_problem((2, 4, 2, 3, 3), form=form, logits="IJ", mask="BI", coupling=coupling, **third)
    assert torch.autograd.gradcheck(*problem.as_function("reference"))


def test_low_precision_is_computed_in_float32_and_rounded_once():
    problem = random_problem((4, 64, 8, 5, 16), bias=True, logits="BIJ", dtype=torch.bfloat16)
    rounded = problem.map(torch.Tensor.float).gradients("reference", cotangent(problem.run("reference")).float())
    for name, value in problem.gradients("reference").items():
        assert torch.equal(value, rounded[name].bfloat16()), name


def test_a_forbidden_pair_takes_no_gradient_of_nan_beside_a_leak():
    logits = torch.randn(2, 3, 4)
    logits[:, :, 1] = -torch.inf
    grad_v = torch.ones(2, 4, 5)
    grad_v[:, 1] = torch.nan
    v = capsroute.dynamic_routing(
        torch.randn(2, 3, 4, 5), 1, logits=logits.requires_grad_(), leaky=True, backend="reference"
    )
    assert torch.autograd.grad(v, logits, grad_v)[0].isfinite().all()
