"""How exact a fused backend must be: at most twice the error of the reference in the same dtype."""

from __future__ import annotations

from dataclasses import replace

import torch
from problems import Problem
from torch import Tensor

ULP = torch.finfo(torch.float32).eps  # of the type that all but float64 are accumulated in

Results = dict[str, Tensor | None]


def assert_as_exact_as_the_reference(problem: Problem, backend: str, grad_v: Tensor | None = None) -> None:
    """Judge v, the coupling and every gradient by their largest deviation from the reference in float64.

    It is at most twice that of the reference. Where a result is a single product, or routing is unstable, the
    reference may be close by luck: 4 units in the last place of the largest value are always allowed, and the
    reference's error counts as at least what moving every input by about one such unit would change. In float64
    the reference is the truth itself, and 1e-11 is allowed.
    """
    exact = problem.map(Tensor.double)
    truth = results(exact, "reference", grad_v)
    own = results(problem, "reference", grad_v)
    moved = None  # seldom needed
    for name, result in results(problem, backend, grad_v).items():
        expected = truth[name]
        if expected is None:
            assert result is None, f"{name} got a gradient that the reference does not give"
            continue
        assert result.dtype == own[name].dtype, name
        assert result.shape == own[name].shape, name
        assert torch.equal(result.isnan(), expected.isnan()), f"{name} has its NaNs elsewhere"

        def error(x: Tensor, expected: Tensor = expected) -> float:
            return largest(x - expected)

        if result.dtype == torch.float64:
            allowed = 1e-11 * max(1, largest(expected))
        else:
            allowed = 2 * error(own[name]) + 4 * ULP * largest(expected)
            if error(result) > allowed:
                moved = moved or [results_of_moved(exact, seed, grad_v) for seed in range(5)]
                allowed = 2 * max(error(x[name]) for x in (own, *moved)) + 4 * ULP * largest(expected)
        assert error(result) <= allowed, f"{name}: error {error(result):.3g}, allowed {allowed:.3g}"


def results(problem: Problem, backend: str, grad_v: Tensor | None = None) -> Results:
    return {"coupling": problem.run(backend, return_coupling=True)[1], **problem.gradients(backend, grad_v)}


def results_of_moved(problem: Problem, seed: int, grad_v: Tensor | None) -> Results:
    """The reference where every number is moved; a weight [O, D] for each j by itself, as its votes are rounded."""
    weight = problem.tensors.get("weight")
    shared = weight is not None and weight.dim() == 2
    if shared:
        outputs = problem.run("reference").shape[-2]
        problem = replace(problem, tensors={**problem.tensors, "weight": weight.expand(outputs, -1, -1)})
    generator = torch.Generator().manual_seed(seed)
    moved = problem.map(
        lambda x: x * (1 + ULP * torch.randn(x.shape, generator=generator, dtype=x.dtype, device="cpu").to(x.device))
    )
    found = results(moved, "reference", grad_v)
    return {**found, "weight": found["weight"].sum(0)} if shared else found


def largest(x: Tensor) -> float:
    return x.double().nan_to_num(0).abs().max().item() if x.numel() else 0.0
