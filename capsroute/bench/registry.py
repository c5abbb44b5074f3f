"""What is compared: the shapes at which capsule routing is used in practice, and the ways to compute it.

Everything that times, weighs or tests an implementation goes through here: `capsroute bench`,
`benchmarks/` and the tests.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import _backends
from ..functional import capsule_linear, dynamic_routing
from ..nn.linear import ORDERS, first_pass_gain
from .plain import matmul
from .rechub import no_rechub, rechub

T = TypeVar("T")
ORDER = ORDERS[None]  # of memory, in which the kernels read a weight [I, J, O, D]


LETTERS = {  # of sizes, and the fields of a case that they are
    "B": "batch",
    "I": "inputs",
    "D": "in_features",
    "J": "outputs",
    "O": "out_features",
    "R": "iterations",
}


def pass_name(backward: bool) -> str:
    return "forward + backward" if backward else "forward"


def passes(backward: bool) -> tuple[bool, ...]:
    """The forward, and the backward too if it is wanted: for each, whether it is the backward."""
    return (False, True) if backward else (False,)


class Case(NamedTuple):
    """A shape in use; `weight` names its dimensions in letters, "" where the votes are given."""

    name: str
    batch: int
    inputs: int
    in_features: int
    outputs: int
    out_features: int
    iterations: int = 3
    weight: str = "IJOD"
    coupling: str = "out"
    detach_coupling: bool = False
    seed: int = 0  # of its random tensors
    order: str = ORDER  # of a weight [I, J, O, D] in memory

    @property
    def sizes(self) -> dict[str, int]:
        """By their letters."""
        return {letter: getattr(self, field) for letter, field in LETTERS.items()}

    @property
    def form(self) -> str:
        """The weight's form, as the kernels name it."""
        return {"IJOD": "pair", "JOD": "output", "OD": "single", "": "votes"}[self.weight]

    @property
    def shared(self) -> bool:
        """Whether input capsules share a weight."""
        return self.form in ("output", "single")

    @property
    def title(self) -> str:
        """Its name, and what is another than the name stands for."""
        own = CASES.get(self.name, self._replace(batch=0)).sizes  # another name says nothing of its batch, so B is told
        other = [f"{letter}={size}" for letter, size in self.sizes.items() if size != own[letter]]
        return " ".join([self.name, *other, *([self.order] if self.order != ORDER else [])])

    def label(self, backward: bool) -> str:
        """The case and pass, for a table or a plot."""
        return f"{self.title}, {pass_name(backward)}"

    @property
    def votes(self) -> int:
        """The numbers in the votes [B, I, J, O]."""
        return self.batch * self.inputs * self.outputs * self.out_features

    def describe(self) -> str:
        """The shape in words, for a table."""
        shape = " ".join(f"{letter}={size}" for letter, size in self.sizes.items() if size)
        given = f"weight [{self.weight}]" if self.weight else "votes given"
        given += f", in memory {self.order}" if self.order != ORDER else ""
        detached = ", detached coupling" if self.detach_coupling else ""
        return f"{shape}, {given}{', softmax over i' if self.coupling == 'in' else ''}{detached}"


CASES = {
    case.name: case
    for case in (
        Case("mnist", 128, 1152, 8, 10, 16),  # Sabour et al. 2017
        Case("mnist-1", 1, 1152, 8, 10, 16),
        Case("cifar10", 128, 4096, 8, 10, 16),
        Case("deepcaps", 256, 2560, 8, 10, 32),  # class capsules, Rajasegaran et al. 2019
        Case("emnist", 100, 1152, 8, 62, 16),
        Case("196-classes", 128, 3872, 8, 196, 16),
        Case("imagenet", 128, 1568, 8, 1000, 16),
        Case("imagenet-192", 32, 192, 8, 1000, 16),  # the same after pooling
        Case("matrix-pose", 4608, 288, 16, 32, 16),  # convolutional capsules: B times positions
        Case("segcaps", 16384, 16, 0, 4, 32, weight=""),  # LaLonde and Bagci 2018: B times pixels
        Case("comirec", 256, 50, 64, 4, 64),  # ComiRec-DR, Cen et al. 2020
        Case("comirec-shared", 256, 50, 64, 4, 64, weight="JOD"),
        Case("mind", 8192, 50, 64, 8, 64, weight="OD"),  # Li et al. 2019; J comes from fixed random logits
        # The same two shapes as torch-rechub routes them.
        Case("comirec-rechub", 256, 50, 64, 4, 64, coupling="in", detach_coupling=True),
        Case("mind-rechub", 8192, 50, 64, 8, 64, weight="OD", coupling="in", detach_coupling=True),
        Case("efficient", 16, 16, 8, 10, 16, iterations=1),  # Efficient-CapsNet, Mazzia et al. 2021
    )
}


class Problem(NamedTuple):
    """The tensors of a case."""

    u: Tensor  # [B, I, D], or the votes [B, I, J, O] where weight is None
    weight: Tensor | None  # [I, J, O, D], in the memory order of the case, [J, O, D] or [O, D]
    logits: Tensor | None  # [I, J]
    iterations: int
    grad_v: Tensor  # [B, J, O]
    coupling: str = "out"
    detach_coupling: bool = False

    def first(self, batch: int) -> Problem:
        """The first samples of it."""
        u = self.u.detach()[:batch].requires_grad_()
        return self._replace(u=u, grad_v=self.grad_v[:batch])


def make_problem(case: Case, dtype: torch.dtype = torch.float32) -> Problem:
    """Random tensors for a case: |u| is about 1, votes as :class:`capsroute.nn.CapsuleLinear` makes them.

    They are drawn on the CPU, and lie on torch's default device.
    """
    generator = torch.Generator("cpu").manual_seed(case.seed)

    def normal(letters: str, std: float) -> Tensor:
        shape = tuple(case.sizes[letter] for letter in letters)
        if torch.get_default_device().type == "meta":
            return torch.empty(shape, dtype=dtype)
        x = torch.empty(shape, device="cpu").normal_(0, std, generator=generator)
        return x.to(torch.get_default_device(), dtype)

    weight, logits = None, None
    std = first_pass_gain(case.inputs, case.outputs, case.coupling) / math.sqrt(case.out_features)
    if case.weight:
        u = normal("BID", std=1 / math.sqrt(case.in_features))
        memory = case.order if case.form == "pair" else case.weight
        weight = normal(memory, std=std)
        weight = weight.permute(*(memory.index(letter) for letter in case.weight)).requires_grad_()
    else:
        u = normal("BIJO", std=std)
    if case.weight == "OD":
        logits = normal("IJ", std=1)
    grad_v = normal("BJO", std=1)
    return Problem(u.requires_grad_(), weight, logits, case.iterations, grad_v, case.coupling, case.detach_coupling)


Forward = Callable[[Problem], Tensor]


def run(forward: Forward, problem: Problem, backward: bool) -> list[Tensor]:
    """v alone, with no gradient wanted, or v and the gradients of u (or the votes) and the weight."""
    if not backward:
        with torch.no_grad():
            return [forward(problem)]
    v = forward(problem)
    leaves = [x for x in (problem.u, problem.weight) if x is not None]
    return [v.detach(), *torch.autograd.grad(v, leaves, problem.grad_v)]


def routed(problem: Problem, backend: str) -> Tensor:
    """v by the package's own operator."""
    u, weight, logits, iterations, _, coupling, detach_coupling = problem
    options = {"logits": logits, "coupling": coupling, "detach_coupling": detach_coupling, "backend": backend}
    if weight is None:
        return dynamic_routing(u, iterations, **options)
    return capsule_linear(u, weight, iterations, **options)


def fused_backend(u: Tensor) -> str:
    """The name of the backend that backend="auto" resolves to for u."""
    chosen = _backends.choose("auto", u, None)
    return next(name for name, backend in _backends.BACKENDS.items() if backend is chosen)


def no_compiler() -> str:
    """Why torch.compile cannot work here, or an empty string."""
    compiler = os.environ.get("CXX", "g++")
    return "" if shutil.which(compiler) else f"needs {compiler}"


def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """torch.compile of a function, for one shape; what was compiled before is forgotten."""
    torch.compiler.reset()  # else the recompile limit is met after a few cases
    return torch.compile(function, dynamic=False, fullgraph=True)


class Implementation(NamedTuple):
    """One way to compute routing.

    Attributes:
        make: gives a function that computes v, new for every case.
        held: the most memory that it holds (forward alone, forward and backward), less inputs and results,
            in votes of the accumulation type: measured, rounded, and only to tell what cannot fit.
        compiles: the first call with a new shape compiles.
        computes: whether a case is what it computes.
        missing: what it needs and is not here, or nothing.
        only: the dtype that it is confined to, if it is.
    """

    make: Callable[[], Forward]
    held: tuple[float, float]
    compiles: bool = False
    computes: Callable[[Case], bool] = lambda case: True
    missing: Callable[[], str] = lambda: ""
    only: torch.dtype | None = None


def is_rechub(case: Case) -> bool:
    """Whether torch-rechub's layer computes the case."""
    square = case.in_features == case.out_features
    return case.coupling == "in" and case.detach_coupling and case.iterations == 3 and square


IMPLEMENTATIONS = {
    "fused": Implementation(lambda: partial(routed, backend="auto"), (0, 0)),
    "reference": Implementation(lambda: partial(routed, backend="reference"), (2, 5.5)),
    "compiled": Implementation(
        lambda: compiled(lambda problem: routed(problem, "reference")), (2, 3.5), compiles=True, missing=no_compiler
    ),
    "matmul": Implementation(
        lambda: lambda p: matmul(p.u, p.weight, p.logits, p.iterations, p.coupling, p.detach_coupling), (0.7, 3.5)
    ),
    # More where each pair has its own weight: it then makes D numbers for each of a vote.
    "torch-rechub": Implementation(
        lambda: lambda p: rechub(p.u, p.weight, p.logits),
        (3, 6),
        computes=is_rechub,
        missing=no_rechub,
        only=torch.float32,
    ),
}


def names_for(cases: Sequence[Case]) -> list[str]:
    """The implementations that compute at least one of the cases."""
    return [name for name, implementation in IMPLEMENTATIONS.items() if any(map(implementation.computes, cases))]
