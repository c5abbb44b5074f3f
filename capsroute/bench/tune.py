"""The command `capsroute tune`: measure the Triton kernels' tiles on this GPU, and keep the best."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from typing import NamedTuple

import torch

from .._console import emit, say
from . import sizes
from .measure import gpu_seconds, replaced
from .registry import CASES, Case, make_problem, routed, run
from .table import format_seconds

ROUNDS = 11


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `capsroute tune` to its parser."""
    names = [name for name in CASES if name != "mnist-1"]  # the layer of mnist
    parser.add_argument(
        "--case",
        nargs="+",
        choices=names,
        default=names,
        dest="cases",
        metavar="NAME",
        help=f"{', '.join(names)} (default: all)",
    )
    sizes.add_argument(parser)
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="default: %(default)s")


def execute(args: argparse.Namespace) -> int:
    """Tune each case, and print the results."""
    from .._triton import load, tuning

    if not torch.cuda.is_available():
        raise ValueError("there is nothing to tune: torch sees no GPU here")
    can, why = load()
    if not can:
        raise ValueError(why)
    tuning.measured()  # a file that is none of ours says so before anything takes long
    if args.sizes and len(args.cases) > 1:
        raise ValueError("--sizes is for one layer: name its case by --case")
    cases = sizes.resized((CASES[name]._replace(seed=args.seed or 0) for name in args.cases), args.sizes)
    results = []
    with torch.device("cuda"):
        for case in cases:
            results.append(tune(case, getattr(torch, args.dtype)))
            say(args, results[-1].describe())
    emit(args, {"dtype": args.dtype, "results": [result._asdict() for result in results]})
    return 0


class Tuned(NamedTuple):
    """Seconds of forward + backward of a case, with the tiles as they were and with the best, and where those are kept.

    The tiles as they were may not fit on this GPU: then `before` is None.
    """

    case: str
    before: float | None
    seconds: float
    path: str

    def describe(self) -> str:
        before = "did not fit" if self.before is None else format_seconds(self.before)
        return f"{self.case}: {before} -> {format_seconds(self.seconds)} forward + backward, kept in {self.path}"


def tune(case: Case, dtype: torch.dtype) -> Tuned:
    """Search the tiles of a case's layer, forward and backward, and store them.

    Raises:
        ValueError: if none fits on this GPU.
    """
    from triton.runtime.errors import OutOfResources

    from .._triton import tuning

    problem = make_problem(case, dtype)

    def seconds(candidate: tuning.Tuning) -> float:
        with replaced(tuning, "for_shape", lambda *_, **__: candidate):
            try:
                times = [gpu_seconds(lambda: run(_by_triton, problem, True)) for _ in range(ROUNDS)]
            except OutOfResources as error:
                print(f"{case.name}: {candidate}: {error}", file=sys.stderr)
                return math.inf
        return statistics.median(times[1:])

    start = tuning.for_device(torch.cuda.get_device_properties())
    best, least, before = tuning.search(seconds, start)
    if least == math.inf:
        raise ValueError(f"{case.name}: no tile that is tried fits on this GPU")
    layer = tuning.key(case.form, case.outputs, case.out_features, case.in_features, dtype)
    path = tuning.store(torch.cuda.get_device_name(), layer, best)
    return Tuned(case.name, None if before == math.inf else before, least, str(path))


def _by_triton(problem):
    return routed(problem, "triton")
