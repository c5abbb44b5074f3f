"""The command `capsroute bench`: compare the implementations of routing at the shapes in use."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from .. import _checks, _ops
from .._console import check_writable, complain, emit, given_path, number, say
from .._files import write_atomically
from .._optional import optional
from ..reference import accumulation_dtype
from . import path, regression, roofline, sizes, sweep, table
from .compare import DisagreementError, compare
from .machine import describe_machine
from .registry import (
    CASES,
    IMPLEMENTATIONS,
    LETTERS,
    ORDER,
    Case,
    make_problem,
    names_for,
    pass_name,
    passes,
)

Asked = tuple[Case, bool]  # and whether with the backward
MOST_THREADS = 1024  # many more crash OpenMP
PICTURES = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `capsroute bench` to its parser."""
    _add_what(parser)
    _add_how(parser)
    _add_instead(parser)
    parser.add_argument("--save", type=given_path, metavar="FILE", help="write the report to FILE, for --compare")
    parser.add_argument(
        "--compare",
        type=given_path,
        metavar="FILE",
        help="compare with the report in FILE; exit with 1 on any regression",
    )


def _add_what(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--case",
        nargs="+",
        choices=(*CASES, "all"),
        default=["mnist"],
        dest="cases",
        metavar="NAME",
        help=f"{', '.join(CASES)}, or all, which takes long (default: mnist)",
    )
    parser.add_argument(
        "--pass",
        choices=("forward", "both"),
        default="both",
        dest="passes",
        help="the forward alone, or also forward + backward (default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        nargs="+",
        type=number(int, 1),
        default=[],
        dest="batches",
        metavar="B",
        help="batch sizes instead of each case's own; --sweep batch has its own",
    )
    sizes.add_argument(parser)
    parser.add_argument(
        "--order",
        choices=["".join(letters) for letters in itertools.permutations("IJOD")],
        metavar="ORDER",
        default=ORDER,
        help="of weights [I, J, O, D] in memory, the last letter fastest: IJOD is as torch allocates them; "
        "default: %(default)s, as CapsuleLinear keeps them and the kernels read them",
    )
    dtypes = [str(dtype).removeprefix("torch.") for dtype in _checks.DTYPES]
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="default: %(default)s")


def _add_how(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        metavar="NAME",
        help=f"{', '.join(IMPLEMENTATIONS)} (default: all that compute one of the cases); ratios are to the "
        "first; --traffic, --explain, --roofline and --sweep look at the kernels alone",
    )
    parser.add_argument(
        "--threads",
        type=number(int, 1, most=MOST_THREADS),
        metavar="N",
        help="threads (default: torch's own choice)",
    )
    parser.add_argument(
        "--seconds",
        type=number(float),
        default=10.0,
        help="to time each case and pass, once warm (default: %(default)g); --traffic and --explain time nothing",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: AMD's GPUs too (default: cpu)")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, in fresh processes")


def _add_instead(parser: argparse.ArgumentParser) -> None:
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--traffic",
        action="store_true",
        help="instead, the bytes that the Triton kernels move: exact; needs Triton, no GPU",
    )
    instead.add_argument(
        "--explain", action="store_true", help="instead, the path that the CPU kernels take for each case, and why"
    )
    instead.add_argument(
        "--roofline", action="store_true", help="instead, how close the CPU kernels come to this machine's limits"
    )
    instead.add_argument(
        "--sweep", choices=sweep.MOST, help="instead, how the time of the CPU kernels grows with B, I or J"
    )
    parser.add_argument(
        "--plot", type=given_path, metavar="FILE", help="with --roofline or --sweep: also draw it, as PNG, PDF or SVG"
    )


def run(args: argparse.Namespace) -> int:
    """Run `capsroute bench`; returns the exit status, 1 if a result was wrong or anything got slower or larger."""
    _check(args)
    instead = ((args.traffic, _traffic), (args.explain, _explain), (args.roofline, _roofline), (args.sweep, _sweep))
    show = next((show for asked, show in instead if asked), _implementations)
    device = torch.device("cuda") if args.device == "cuda" and show is _implementations else nullcontext()
    with device, _threads(args.threads):
        return show(args, _asked(args), getattr(torch, args.dtype))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch have so many threads while the context lasts."""
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _named(args: argparse.Namespace) -> list[Case]:
    return [CASES[name] for name in (CASES if "all" in args.cases else args.cases)]


def _asked(args: argparse.Namespace) -> list[Asked]:
    named = [case._replace(seed=args.seed or 0) for case in _named(args)]
    named = [case._replace(order=args.order) if case.form == "pair" else case for case in named]
    named = sizes.resized(named, args.sizes)
    cases = [case._replace(batch=batch) for case in named for batch in args.batches or [case.batch]]
    return list(itertools.product(dict.fromkeys(cases), passes(args.passes == "both")))


def _implementations(args: argparse.Namespace, asked: list[Asked], dtype: torch.dtype) -> int:
    """The header and the table."""
    base = regression.load(args.compare) if args.compare else None  # before anything takes long
    cases = list(dict.fromkeys(case for case, _ in asked))
    about, names = describe_machine(dtype), list(dict.fromkeys(args.implementations or names_for(cases)))
    facts = *about.items(), *((case.title, case.describe()) for case in cases)
    say(args, "\n".join(f"- {name}: {value}" for name, value in facts))
    if base:
        keys = [(case, pass_name(backward)) for case, backward in asked]
        regression.check(base, args.dtype, about["threads"], keys, names[0])
    say(args, "\n" + table.head(f"{args.dtype}, ± half the interquartile range", names))
    lines, rows = [], []
    report = {"dtype": args.dtype, "machine": about, "results": rows}
    for case, backward in asked:
        label = case.label(backward)
        try:
            results = compare(case, backward, names, dtype=dtype, seconds=args.seconds, memory=args.memory)
        except DisagreementError as error:
            complain(args, f"{label}: {error}")
            return 1
        say(args, table.rows(label, results))
        lines.append((label, results))
        rows += [{"case": case._asdict(), "pass": pass_name(backward), **result._asdict()} for result in results]
        if args.save:  # at once: the next case may fail
            write_atomically(args.save, json.dumps({"command": args.command, **report}).encode())
    if found := table.narrowest(lines):
        say(args, found)
    return _conclude(args, report, base)


def _conclude(args: argparse.Namespace, report: dict, base: dict | None) -> int:
    """Emit the report, with what changed since the base; 1 if anything got slower or larger."""
    if base is None:
        emit(args, report)
        return 0
    changes = regression.changes(base, report)
    if changes:
        say(args, f"\nAgainst {args.compare}, beside the other implementations:")
        say(args, "\n".join(f"- {change.describe()}" for change in changes))
    unlike = regression.unlike(base, report)
    for words in unlike:
        say(args, f"- {words}")
    emit(args, {**report, "changes": [change._asdict() for change in changes], "unlike": unlike})
    return int(any(change.slower or change.larger for change in changes))


def _check(args: argparse.Namespace) -> None:
    """Check that options go together, files can be written and the GPU is there, before anything takes long."""
    if args.plot and not (args.roofline or args.sweep):
        raise ValueError("--plot draws what --roofline or --sweep measures: give one of them too")
    if args.traffic or args.explain or args.roofline or args.sweep:
        if args.save or args.compare or args.memory:
            instead = "--traffic, --explain, --roofline or --sweep"
            raise ValueError(f"--save, --compare and --memory are for implementations, not for {instead}")
        if args.device == "cuda" and not args.traffic:
            raise ValueError("--explain, --roofline and --sweep are for the CPU kernels, got --device cuda")
    if args.explain or args.roofline or args.sweep:
        can, why = _ops.cpu_library()
        if not can:
            raise ValueError(f"--explain, --roofline and --sweep look at the CPU kernels: {why}")
    if args.sweep == "batch" and args.batches:
        raise ValueError(
            f"--sweep batch goes through all batches itself, got --batch {' '.join(map(str, args.batches))}"
        )
    if args.order != ORDER and all(case.form != "pair" for case in _named(args)):
        raise ValueError(f"--order is of weights [I, J, O, D], and no case asked for has one, got --order {args.order}")
    _check_sizes(args)
    if args.device == "cuda" and not args.traffic and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    check_writable("--save", args.save)
    check_writable("--plot", args.plot)
    if args.plot:
        optional("matplotlib")
        if args.plot.suffix.lower() not in PICTURES:
            raise ValueError(f"--plot must end in {', '.join(PICTURES)}, got {args.plot}")


def _check_sizes(args: argparse.Namespace) -> None:
    given = [letter for letter, _ in args.sizes]
    if args.batches and "B" in given:
        raise ValueError("--batch and --sizes B=N say the same: give one of them")
    if swept := next((letter for letter in given if LETTERS[letter] == args.sweep), ""):
        raise ValueError(f"--sweep {args.sweep} goes through all {swept} itself, got it in --sizes")


def _traffic(args: argparse.Namespace, asked: list[Asked], dtype: torch.dtype) -> int:
    from .._triton import installed

    can, why = installed()
    if not can:
        raise ValueError(f"--traffic reads the launches of the Triton backend: {why}")
    from . import traffic

    found = [(case, backward, traffic.traffic(case, backward, dtype)) for case, backward in asked]
    say(args, traffic.rows(found))
    results = [
        {"case": case._asdict(), "pass": pass_name(backward), **moved._asdict()} for case, backward, moved in found
    ]
    emit(args, {"dtype": args.dtype, "results": results})
    return 0


def _explain(args: argparse.Namespace, asked: list[Asked], dtype: torch.dtype) -> int:
    results = []
    say(args, f"{_ops.cpu_library()[1]}, {args.dtype}:")
    problem_of = functools.lru_cache(1)(make_problem)  # one for both passes
    for case, backward in asked:
        found = path.path_of(problem_of(case, dtype), backward)
        words, name = path.explain(case, found, backward), "backward" if backward else "forward"
        say(args, f"{case.title}, {name}: {words}")
        results.append({"case": case._asdict(), "pass": name, "path": found._asdict(), "why": words})
    emit(args, {"dtype": args.dtype, "results": results})
    return 0


def _roofline(args: argparse.Namespace, asked: list[Asked], dtype: torch.dtype) -> int:
    machine = roofline.measure_machine(accumulation_dtype(dtype))
    points = [roofline.measure(case, backward, dtype, args.seconds) for case, backward in asked]
    say(args, roofline.rows(machine, points))
    if args.plot:
        roofline.plot(machine, points, args.plot)
        say(args, f"\nwrote {args.plot}")
    results = [{**point._asdict(), "roof": point.roof(machine)} for point in points]
    emit(args, {"dtype": args.dtype, "machine": machine._asdict(), "results": results})
    return 0


def _sweep(args: argparse.Namespace, asked: list[Asked], dtype: torch.dtype) -> int:
    curves = []
    for case, backward in asked:
        curves.append(sweep.measure(case, args.sweep, backward, dtype, args.seconds))
        say(args, sweep.rows(curves[-1]))
    if args.plot:
        sweep.plot(curves, args.plot)
        say(args, f"wrote {args.plot}")
    emit(args, {"dtype": args.dtype, "results": [curve._asdict() for curve in curves]})
    return 0
