"""Random routing problems, and how the tests run them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import capsroute

# The backends that the fused suite judges against the reference: names from capsroute.backends(), with commas
# between them.
FUSED = os.environ.get("CAPSROUTE_TEST_BACKEND", "cpu,triton").split(",")

FORMS = ("ijod", "jod", "od", "votes")  # of the weight; "votes": there is none

# One entry per option, then all of them at once. "forbid" puts -inf into the logits.
OPTIONS = {
    "plain": {},
    "one pass": {"iterations": 1, "bias": True},
    "bias": {"iterations": 2, "bias": True},
    "logits": {"logits": "BIJ"},
    "logits, one pass": {"logits": "BIJ", "iterations": 1},
    "logits of the layer": {"logits": "1IJ", "bias": True},
    "logits of j": {"logits": "J", "iterations": 2},
    "logits of b, i": {"logits": "BI1", "leaky": True},
    "logits of b, j": {"logits": "B1J"},
    "forbid": {"logits": "BIJ", "forbid": True},
    "mask": {"mask": "BI"},
    "mask, one pass": {"mask": "BI", "iterations": 1},
    "mask of the layer": {"mask": "I", "bias": True},
    "leaky": {"leaky": True},
    "leaky, one pass": {"leaky": True, "iterations": 1},
    "detach": {"detach_coupling": True, "bias": True, "logits": "BIJ"},
    "all": {"iterations": 5, "bias": True, "logits": "BIJ", "forbid": True, "mask": "BI", "leaky": True},
    "all, detached": {
        "iterations": 4,
        "bias": True,
        "logits": "1IJ",
        "forbid": True,
        "mask": "BI",
        "leaky": True,
        "detach_coupling": True,
        "eps": 1e-3,
    },
}
OPTIONS_IN = {  # a leak is defined for the softmax over j only
    f"in, {name}": {**{key: x for key, x in options.items() if key != "leaky"}, "coupling": "in"}
    for name, options in OPTIONS.items()
    if not name.startswith("leaky")
}

# One pass by itself: where there is a query.
PASSES = {
    "pass": {"query": "BJO"},
    "pass, scaled": {"query": "BJO", "scale": 0.7, "logits": "1IJ"},
    "pass, one query": {"query": "JO", "mask": "BI", "leaky": True},
    "pass, in": {"query": "BJO", "coupling": "in"},
    "pass, all": {"query": "BJO", "scale": -0.5, "logits": "BIJ", "forbid": True, "mask": "BI", "leaky": True},
    "pass, all, in": {
        "query": "1JO",
        "scale": 3.0,
        "logits": "BIJ",
        "forbid": True,
        "mask": "BI",
        "coupling": "in",
    },
}
EVERY = OPTIONS | OPTIONS_IN | PASSES

# Every tensor of routing.
EVERYTHING = {"bias": True, "logits": "BIJ", "mask": "BI"}

# B, I, D, J, O so large that the cpu kernels change their ways: they make the votes of a weight [I, J, O, D]
# anew in every pass, and the backward takes the batch in chunks, or makes the coupling anew, or takes few input
# capsules at a time; or they keep some votes and make others anew.
LARGE = {
    "batch in chunks": (37, 260, 2, 257, 1),
    "coupling made anew": (19, 520, 2, 257, 1),
    "few input capsules": (35, 19, 67, 5, 33),
    "votes kept in part": (6, 1500, 4, 10, 16),
}


def cases(options: dict[str, dict], forms: Iterable[str] = FORMS) -> list[tuple[str, str]]:
    """The (form, name of an option) that go together: with a weight [O, D] J must come from logits or bias."""
    return [
        (form, name)
        for form, name in itertools.product(forms, options)
        if form != "od" or {"bias", "query"} & options[name].keys() or options[name].get("logits", "").endswith("J")
    ]


@dataclass(frozen=True)
class Problem:
    """The arguments of one call: floating-point tensors by name, the mask, the other options."""

    tensors: dict[str, Tensor]
    mask: Tensor | None = None
    options: dict = field(default_factory=dict)

    def run(self, backend: str, **changes):
        if "query" in self.tensors:
            call = capsroute.votes_pass if "votes" in self.tensors else capsroute.routing_pass
        else:
            call = capsroute.dynamic_routing if "votes" in self.tensors else capsroute.capsule_linear
        return call(**{**self.tensors, "mask": self.mask, **self.options, "backend": backend, **changes})

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        return replace(self, tensors={name: change(x) for name, x in self.tensors.items()})

    def as_function(self, backend: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """v as a function of the tensors alone, and those, with a gradient wanted: what gradcheck takes."""

        def run(*tensors):
            return replace(self, tensors=dict(zip(self.tensors, tensors, strict=True))).run(backend)

        return run, tuple(x.detach().requires_grad_() for x in self.tensors.values())

    def gradients(self, backend: str, grad_v: Tensor | None = None, wanted: Iterable[str] | None = None) -> dict:
        """v and the gradients of <v, grad_v>, by name; grad_v is random, and the same for the same shape."""
        wanted = list(self.tensors if wanted is None else wanted)
        leaves = replace(
            self, tensors={name: x.detach().requires_grad_(name in wanted) for name, x in self.tensors.items()}
        )
        v = leaves.run(backend)
        grad_v = cotangent(v) if grad_v is None else grad_v
        grads = torch.autograd.grad(v, [leaves.tensors[name] for name in wanted], grad_v, allow_unused=True)
        return {"v": v.detach(), **dict(zip(wanted, grads, strict=True))}


def detached(problem: Problem, backend: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Problem.as_function for torch.func, to which autograd has nothing to say."""
    function, tensors = problem.as_function(backend)
    return function, tuple(x.detach() for x in tensors)


def cotangent(v: Tensor) -> Tensor:
    return torch.randn(v.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(v)


def fit(backend: str, sizes: tuple[int, int, int, int, int]) -> tuple[int, int, int, int, int]:
    """B, I, D, J, O, cut to what Triton's interpreter can do in about a second."""
    if backend != "triton" or torch.get_default_device().type != "cpu":
        return sizes
    return tuple(min(size, most) for size, most in zip(sizes, (6, 9, 5, 70, 128), strict=True))


def random_problem(
    sizes: tuple[int, int, int, int, int] = (2, 5, 3, 3, 4),  # B, I, D, J, O
    *,
    form: str = "ijod",
    bias: bool = False,
    logits: str | None = None,  # its shape in letters, 1 where it broadcasts
    mask: str | None = None,  # likewise
    query: str | None = None,  # likewise; then the problem is one pass
    forbid: bool = False,
    dtype: torch.dtype = torch.float64,
    parameters: torch.dtype | None = None,  # of bias and logits; as dtype if not given
    seed: int = 0,
    **options,
) -> Problem:
    """Votes of about unit size, so that the coupling is far from uniform and squash far from saturated."""
    length = dict(zip("BIDJO", sizes, strict=True)) | {"1": 1}
    generator = torch.Generator().manual_seed(seed)

    def normal(letters: str, dtype: torch.dtype | None) -> Tensor:
        shape = [length[letter] for letter in letters.upper()]
        x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return x.to(torch.get_default_device(), dtype or torch.float64)

    if form == "votes":
        tensors = {"votes": normal("BIJO", dtype)}
    else:
        tensors = {"u": normal("BID", dtype), "weight": (normal(form, None) / length["D"] ** 0.5).to(dtype)}
    if bias:
        tensors["bias"] = normal("JO", parameters or dtype)
    if logits:
        b = normal(logits, parameters or dtype)
        if forbid:
            few = torch.rand(b.shape, generator=generator, device="cpu") < 0.3
            b = b.masked_fill(few.to(b.device), -torch.inf)
            b[(slice(0, 1),) * (b.dim() - 1)] = -torch.inf  # all of the first row
        tensors["logits"] = b
    if query:
        tensors["query"] = normal(query, parameters or dtype)
    keep = None
    if mask:
        keep = torch.rand([length[letter] for letter in mask], generator=generator, device="cpu") < 0.7
        keep = keep.to(torch.get_default_device())
        if mask[0] == "B" and length["B"] > 1:
            keep[-1] = False  # all of the last sample is masked
    return Problem(tensors, keep, options)
