"""The command `capsroute tune`: measure the Triton kernels' tiles on this GPU, and keep the best."""

from __future__ import annotations

import argparse
import statistics
import sys
from unittest import mock

import torch

from .measure import gpu_seconds
from .registry import CASES, Case, make_problem, routed, run
from .table import format_seconds

ROUNDS = 11


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `capsroute tune` to its parser."""
    names = [name for name in CASES if name != "mnist-1"]  # the layer of mnist
    parser.add_argument("--case", nargs="+", choices=names, default=names, dest="cases", metavar="NAME")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")


def execute(args: argparse.Namespace) -> int:
    """Tune each case, and say what came of it."""
    from .._triton import load

    if not torch.cuda.is_available():
        raise ValueError("there is nothing to tune: torch sees no GPU here")
    can, why = load()
    if not can:
        raise ValueError(why)
    torch.set_default_device("cuda")
    for name in args.cases:
        print(tune(CASES[name], getattr(torch, args.dtype)), flush=True)
    return 0


def tune(case: Case, dtype: torch.dtype) -> str:
    """Search the tiles of a case's layer, forward and backward, and store them."""
    from triton.runtime.errors import OutOfResources

    from .._triton import tuning

    problem = make_problem(case, dtype)

    def seconds(candidate: tuning.Tuning) -> float:
        with mock.patch.object(tuning, "for_shape", return_value=candidate):
            try:
                times = [gpu_seconds(lambda: run(_by_triton, problem, True)) for _ in range(ROUNDS)]
            except OutOfResources as error:
                print(f"{case.name}: {candidate}: {error}", file=sys.stderr)
                return float("inf")
        return statistics.median(times[1:])

    best, least, before = tuning.search(seconds)
    form = {"IJOD": "pair", "JOD": "output", "OD": "single", "": "votes"}[case.weight]
    layer = tuning.key(form, case.outputs, case.out_features, case.in_features, dtype)
    path = tuning.store(torch.cuda.get_device_name(), layer, best)
    return f"{case.name}: {format_seconds(before)} -> {format_seconds(least)} forward + backward, kept in {path}"


def _by_triton(problem):
    return routed(problem, "triton")
