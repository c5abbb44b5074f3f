"""The command `capsroute bench`: the implementations of routing, compared at the shapes in use."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
from pathlib import Path

import torch

from .. import __version__, _ops
from .._console import check_writable, complain, emit, number, say
from .._optional import optional
from ..reference import accumulation_dtype
from . import path, regression, roofline, sweep, table
from .compare import DisagreementError, compare
from .registry import CASES, IMPLEMENTATIONS, Case, fused_backend, make_problem, names_for, pass_name

DTYPES = ("float32", "float64", "bfloat16", "float16")
MOST_THREADS = 1024  # many more crash OpenMP
PICTURES = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `capsroute bench` to its parser."""
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
        help="one or several, instead of each case's own; --sweep batch has its own",
    )
    parser.add_argument(
        "--threads", type=number(int, 1, most=MOST_THREADS), metavar="N", help="of torch (default: its own choice)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        metavar="NAME",
        help=f"{', '.join(IMPLEMENTATIONS)} (default: all that compute one of the cases); ratios are to the "
        "first; --traffic, --explain, --roofline and --sweep are of the kernels alone",
    )
    parser.add_argument(
        "--seconds",
        type=number(float),
        default=10.0,
        help="to time each case and pass, once warm (default: %(default)g); --traffic and --explain time nothing",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: also AMD's GPUs (default: cpu)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--traffic", action="store_true", help="instead, the bytes that the GPU kernels move: exact, and needs no GPU"
    )
    instead.add_argument(
        "--explain", action="store_true", help="instead, the path that the CPU kernels take for each case, and why"
    )
    instead.add_argument(
        "--roofline", action="store_true", help="instead, how near the CPU kernels come to this machine's limits"
    )
    instead.add_argument(
        "--sweep", choices=sweep.MOST, help="instead, how the time of the CPU kernels grows with B, I or J"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="with --roofline or --sweep: also draw it, as PNG, PDF or SVG"
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the report there, for --compare")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="say what got slower since; exit with 1 if anything did"
    )
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, in fresh processes")


def run(args: argparse.Namespace) -> int:
    """Print the header and the table; returns the exit status, 1 if a result was wrong."""
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    cases = [CASES[name] for name in (CASES if "all" in args.cases else args.cases)]
    cases = [case._replace(seed=args.seed or 0) for case in cases]
    if args.batches:
        cases = [case._replace(batch=batch) for case in cases for batch in args.batches]
    _check(args)
    if args.traffic:
        return _traffic(args, cases, dtype)
    if args.explain or args.roofline or args.sweep:
        return (_roofline if args.roofline else _sweep if args.sweep else _explain)(args, cases, dtype)
    if args.device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here")
        torch.set_default_device("cuda")
    base = regression.load(args.compare) if args.compare else None  # before anything takes long
    about = describe_machine(dtype)

    say(
        args,
        "\n".join(f"- {name}: {value}" for name, value in (*about.items(), *((c.title, c.describe()) for c in cases))),
    )
    names = args.implementations or names_for(cases)
    if base:
        keys = [(case, pass_name(backward)) for case in cases for backward in _passes(args)]
        regression.check(base, args.dtype, about["threads"], keys, names[0])
    say(args, "\n" + table.head(f"{args.dtype}, ± half the quartile distance", names))
    measured, rows = [], []
    report = {"dtype": args.dtype, "machine": about, "results": rows}
    for case in cases:
        for backward in _passes(args):
            label = case.label(backward)
            try:
                results = compare(case, backward, names, dtype=dtype, seconds=args.seconds, memory=args.memory)
            except DisagreementError as error:
                complain(args, f"{label}: {error}")
                return 1
            say(args, table.rows(label, results))
            measured.append((case, backward, results))
            rows += [{"case": case._asdict(), "pass": pass_name(backward), **result._asdict()} for result in results]
            if args.save:  # at once: the next case may fail
                args.save.write_text(json.dumps({"command": args.command, **report}))
    if found := table.narrowest((case.label(backward), results) for case, backward, results in measured):
        say(args, found)
    changes = regression.changes(base, report) if base else []
    if changes:
        say(args, f"\nAgainst {args.compare}, beside the other implementations:")
        say(args, "\n".join(f"- {change.describe()}" for change in changes))
    emit(args, {**report, "changes": [change._asdict() for change in changes]} if base else report)
    return int(any(change.slower or change.larger for change in changes))


def _check(args: argparse.Namespace) -> None:
    """That options go together and files can be written, before anything takes long."""
    if args.plot and not (args.roofline or args.sweep):
        raise ValueError("--plot draws what --roofline or --sweep measures: give both")
    if args.traffic or args.explain or args.roofline or args.sweep:
        if args.save or args.compare or args.memory:
            instead = "--traffic, --explain, --roofline or --sweep"
            raise ValueError(f"--save, --compare and --memory are for implementations, not for {instead}")
        if args.device == "cuda" and not args.traffic:
            raise ValueError("--explain, --roofline and --sweep are of the CPU kernels, got --device cuda")
    if args.sweep == "batch" and len(args.batches) > 1:
        raise ValueError(
            f"--sweep batch goes through all batches itself, got --batch {' '.join(map(str, args.batches))}"
        )
    check_writable("--save", args.save)
    check_writable("--plot", args.plot)
    if args.plot:
        optional("matplotlib")
        if args.plot.suffix.lower() not in PICTURES:
            raise ValueError(f"--plot must end in {', '.join(PICTURES)}, got {args.plot}")


def _traffic(args: argparse.Namespace, cases: list[Case], dtype: torch.dtype) -> int:
    from .._triton import installed

    can, why = installed()
    if not can:
        raise ValueError(f"--traffic reads the launches of the Triton backend: {why}")
    from . import traffic

    found = [(case, backward, traffic.traffic(case, backward, dtype)) for case in cases for backward in _passes(args)]
    say(args, traffic.rows(found))
    results = [{"case": case._asdict(), "backward": backward, **moved._asdict()} for case, backward, moved in found]
    emit(args, {"dtype": args.dtype, "results": results})
    return 0


def _passes(args: argparse.Namespace) -> tuple[bool, ...]:
    return (False, True)[: 1 + (args.passes == "both")]


def _explain(args: argparse.Namespace, cases: list[Case], dtype: torch.dtype) -> int:
    results = []
    say(args, f"{_ops.cpu_library()[1]}, {args.dtype}:")
    for case in cases:
        problem = make_problem(case, dtype)
        for backward in _passes(args):
            found = path.path_of(problem, backward)
            words = path.explain(case, found, backward)
            say(args, f"{case.title}, {'backward' if backward else 'forward'}: {words}")
            results.append({"case": case._asdict(), "backward": backward, "path": found._asdict(), "why": words})
    emit(args, {"dtype": args.dtype, "results": results})
    return 0


def _roofline(args: argparse.Namespace, cases: list[Case], dtype: torch.dtype) -> int:
    machine = roofline.measure_machine(accumulation_dtype(dtype))
    points = [roofline.measure(case, backward, dtype, args.seconds) for case in cases for backward in _passes(args)]
    say(args, roofline.rows(machine, points))
    if args.plot:
        roofline.plot(machine, points, args.plot)
        say(args, f"\nwrote {args.plot}")
    results = [{**point._asdict(), "roof": point.roof(machine)} for point in points]
    emit(args, {"dtype": args.dtype, "machine": machine._asdict(), "results": results})
    return 0


def _sweep(args: argparse.Namespace, cases: list[Case], dtype: torch.dtype) -> int:
    curves = []
    for case in cases:
        for backward in _passes(args):
            curves.append(sweep.measure(case, args.sweep, backward, dtype, args.seconds))
            say(args, sweep.rows(curves[-1]))
    if args.plot:
        sweep.plot(curves, args.plot)
        say(args, f"wrote {args.plot}")
    emit(args, {"dtype": args.dtype, "results": [curve._asdict() for curve in curves]})
    return 0


def describe_machine(dtype: torch.dtype) -> dict[str, object]:
    """What the figures depend on besides the code: processor, threads, versions."""
    compiler = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", _library())
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}, {os.cpu_count()} logical processors",
        "gpu": _gpu(),
        "threads": torch.get_num_threads(),
        "fused": f"{fused_backend(torch.empty(0, 1, 1, dtype=dtype))} ({_ops.cpu_library()[1]})",
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
        "capsroute": __version__,
        "compiler": compiler[0].decode() if compiler else "unknown",
    }


def _gpu() -> str:
    if torch.get_default_device().type != "cuda":
        return "not used"
    about = torch.cuda.get_device_properties()
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{about.name}, {about.multi_processor_count} processors, {about.total_memory >> 30} GiB, {runtime}"


def _library() -> bytes:
    """The library of kernels, in which the compiler leaves its name."""
    return _ops.LIBRARY.read_bytes() if _ops.LIBRARY.exists() else b""


def _processor() -> str:
    name = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return name[1] if name else "unknown processor"
