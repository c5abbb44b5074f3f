"""Compile every kernel ahead of time for every kind of GPU, with none at hand: `python -m capsroute._triton.aot`.

What is compiled is what the launchers launch, recorded from them: their arguments, constants and options, through
Triton's own launch path with a driver that knows only the target. The registers and spills are those of ptxas and
LLVM. Triton keeps what it compiled in its cache, so a second run is short.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import backward, forward, tuning
from .problem import Launch, Problem, Step

KIB = 1024
# Shared memory that a block may have, in bytes.
SHARED = {"75": 64, "80": 163, "86": 99, "89": 99, "90": 227, "100": 227, "120": 99}
TARGETS = {f"sm_{arch}": (GPUTarget("cuda", int(arch), 32), limit * KIB) for arch, limit in SHARED.items()}
TARGETS |= {
    arch: (GPUTarget("hip", arch, 32 if arch == "gfx1100" else 64), 64 * KIB)
    for arch in ("gfx90a", "gfx942", "gfx1100")
}
LOW_PRECISION = ("sm_80", "sm_90", "gfx942")  # where the 16-bit types are compiled too


class Usage(NamedTuple):
    """What a kernel takes: registers a thread, bytes spilled a thread (registers on AMD), shared memory a block."""

    registers: int
    spilled: int
    shared: int
    matrix: bool  # whether it uses matrix instructions


class Row(NamedTuple):
    """A launch of a case, and what it takes on each target that has it."""

    case: str
    launch: Launch
    usages: dict[str, Usage]


def compiled_rows(dtype: torch.dtype, targets: Iterable[str], quick: bool = False) -> Iterator[Row]:
    """Compile every launch for every target that launches it, in as many processes as there are processors."""
    named: dict[tuple, tuple[str, Launch, list[str]]] = {}
    for target in targets:
        for case, launch in launches(dtype, tuning.ARCHITECTURES[target], quick):
            named.setdefault((case, _signature(launch)), (case, launch, []))[2].append(target)
    rows = list(named.values())

    def usages(index: int) -> dict[str, Usage]:
        _, launch, its_targets = rows[index]
        return {target: compiled(launch, target) for target in its_targets}

    global _usages
    _usages = usages  # a forked process finds it here; a launch cannot be sent to one
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        for (case, launch, _), found in zip(rows, pool.map(_in_process, range(len(rows))), strict=True):
            yield Row(case, launch, found)


def _in_process(index: int) -> dict[str, Usage]:
    return _usages(index)


class _Driver:
    """A driver without a device; its number, by which Triton keeps what it compiled, is the target's."""

    def __init__(self, target: str):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target][0]

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def compiled(launch: Launch, target: str) -> Usage:
    """Compile a launch for a target, and read what it takes."""
    gpu, _ = TARGETS[target]
    driver.set_active(_Driver(target))
    kernel = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    shared = kernel.metadata.shared
    if gpu.backend == "hip":
        text = kernel.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{name}: +(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")
        )
        return Usage(registers, spilled, shared, bool(re.search("v_(mfma|wmma)", text)))
    registers, stack, local = _resources(kernel.asm["cubin"])
    return Usage(
        registers, stack + local, shared, bool(re.search(r"\b(wgmma|mma\.sync|tcgen05\.mma)", kernel.asm["ptx"]))
    )


def _resources(cubin: bytes) -> tuple[int, int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))


STREAMS = {"route", "pass_", "rows", "merge_rows", "gradients", "column_coupling", "outer", "key_query"}


def launches(dtype: torch.dtype, numbers: tuning.Tuning, quick: bool = False) -> Iterator[tuple[str, Launch]]:
    """Each kernel as the launchers launch it, by case: every kernel, and every shape of the streams."""

    def steps(sizes: tuple[int, ...], letters: str, **options) -> list[Step]:
        return _steps(sizes, letters, dtype, numbers, **options)

    # B, I, D, J, O, the weight's letters
    yield from _distinct("MNIST", steps((128, 1152, 8, 10, 16), "IJOD"))
    if quick:
        return
    yield from _distinct("MIND", steps((8192, 50, 64, 8, 64), "OD", logits=True))
    yield from _streams("MIND, detached", steps((8192, 50, 64, 8, 64), "OD", logits=True, detach=True))
    yield from _streams("ComiRec, a weight per interest", steps((256, 50, 64, 4, 64), "JOD", mask=True))
    yield from _streams("EfficientCaps", steps((16, 16, 8, 10, 16), "IJOD", iterations=1))
    yield from _streams("196 classes", steps((128, 3872, 8, 196, 16), "IJOD"))
    yield from _streams("1000 classes", steps((32, 192, 8, 1000, 16), "IJOD"))
    yield from _streams("ComiRec", steps((256, 50, 64, 4, 64), "IJOD"))
    yield from _streams("D = O = 128", steps((256, 50, 128, 4, 128), "IJOD"))
    yield from _streams("D = O = 128, one weight", steps((256, 50, 128, 4, 128), "OD", logits=True))
    yield from _streams("SegCaps", steps((16384, 16, 0, 4, 32), ""))
    everything = {"logits": True, "mask": True, "bias": True, "leaky": True, "return_coupling": True}
    yield from _streams("MNIST, every option", steps((128, 1152, 8, 10, 16), "IJOD", iterations=2, **everything))
    over_inputs = {"over_inputs": True, "return_coupling": True}
    yield from _streams("MNIST, over i", steps((128, 1152, 8, 10, 16), "IJOD", iterations=2, **over_inputs))
    yield from _streams("MNIST, detached", steps((128, 1152, 8, 10, 16), "IJOD", detach=True))
    query = torch.empty(8192, 8, 64, device="meta")
    p = Problem.of(*_tensors((8192, 50, 64, 8, 64), "OD", dtype), query, None, None, False, False)
    p = replace(p, tuning=numbers)
    yield from _streams("one pass of MIND", forward.stream_query(p, query)[0])


def _tensors(sizes: tuple[int, ...], letters: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """u, or the votes, and the weight: [I, J, O, D] in the memory order I, D, J, O."""
    length = dict(zip("BIDJO", sizes, strict=True))

    def empty(names: str) -> torch.Tensor:
        return torch.empty([length[name] for name in names], dtype=dtype, device="meta")

    if not letters:
        return empty("BIJO"), None
    return empty("BID"), empty("IDJO").permute(0, 2, 3, 1) if letters == "IJOD" else empty(letters)


def _steps(
    sizes, letters, dtype, numbers, *, iterations=3, over_inputs=False, leaky=False, bias=False, logits=False,
    mask=False, return_coupling=False, detach=False,
) -> list[Step]:  # fmt: skip
    B, I, _, J, O = sizes
    u, weight = _tensors(sizes, letters, dtype)
    given = [
        torch.empty(J, O, dtype=dtype, device="meta") if bias else None,
        torch.empty(1, I, J, dtype=dtype, device="meta") if logits else None,
        torch.empty(B, I, dtype=torch.bool, device="meta") if mask else None,
    ]
    p = replace(Problem.of(u, weight, *given, over_inputs, leaky), tuning=numbers)
    steps, (v, s, norm, last_logits, _) = forward.route(
        p, iterations, 1e-9, 1 if detach else iterations, return_coupling
    )
    if detach:
        iterations, logits = 1, False
        p = replace(p, logits=last_logits, kept={})
    needs = backward.Needs(True, weight is not None, bias, logits)
    return steps + backward.route_backward(p, v, s, norm, iterations, 1e-9, needs)[0]


def _distinct(case: str, steps: Iterable[Step]) -> Iterator[tuple[str, Launch]]:
    seen = set()
    for step in steps:
        if isinstance(step, Launch) and (key := _signature(step)) not in seen:
            seen.add(key)
            yield case, step


def _streams(case: str, steps: Iterable[Step]) -> Iterator[tuple[str, Launch]]:
    """Without what runs between them, which is alike in every case."""
    yield from ((name, launch) for name, launch in _distinct(case, steps) if launch.kernel.fn.__name__ in STREAMS)


def _signature(launch: Launch) -> tuple:
    """What the compiler is given: the types of tensors, which numbers are 1 or a multiple of 16, the constants."""

    def kind(x, fixed=False):
        if isinstance(x, torch.Tensor):
            return x.dtype
        if isinstance(x, tuple):
            return tuple(map(kind, x))
        if isinstance(x, int) and not isinstance(x, bool):
            return x >= 2**31 if fixed else (x == 1, x % 16 == 0, x >= 2**31)
        return x

    kinds = (
        kind(x, parameter.do_not_specialize) for x, parameter in zip(launch.args, launch.kernel.params, strict=True)
    )
    return (launch.name, launch.warps, *kinds)


def problems(row: Row) -> Iterator[str]:
    """What must not be: spills on sm_80 and newer, or more than the target has."""
    for target, usage in row.usages.items():
        gpu, shared = TARGETS[target]
        place = f"{row.case}, {row.launch.name}, {target}"
        if usage.spilled and target != "sm_75":
            yield f"{place}: {usage.spilled} spilled"
        if usage.shared > shared:
            yield f"{place}: {usage.shared} bytes of shared memory, {shared} are there"
        if gpu.backend == "cuda" and usage.registers * row.launch.warps * 32 > 64 * KIB:
            yield f"{place}: {usage.registers} registers in {row.launch.warps} warps"


def table(rows: list[Row], targets: Iterable[str]) -> str:
    """Registers a thread / KiB of shared memory a block, for each target."""
    lines = [
        "| case | kernel | warps | tile | " + " | ".join(targets) + " |",
        "| --- | --- | ---: | --- |" + " ---: |" * len(targets),
    ]
    for row in rows:
        static = row.launch.args[-1]
        tile = "x".join(map(str, (static.TB, static.JB, static.XB)))
        cells = [_cell(row.usages[target]) if target in row.usages else "" for target in targets]
        lines.append(f"| {row.case} | `{row.launch.name}` | {row.launch.warps} | {tile} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(usage: Usage) -> str:
    spilled = f", {usage.spilled} spilled" if usage.spilled else ""
    return f"{usage.registers} / {usage.shared / KIB:.3g}{spilled}{', matrix' if usage.matrix else ''}"


def main(argv: list[str] | None = None) -> int:
    """Compile, print the table, and fail for what must not be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the kernels of one case, for three targets")
    parser.add_argument("--target", nargs="+", choices=TARGETS, help="only these")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing")
    text, wrong = [f"# The Triton kernels, compiled\n\n{ABOUT}"], []
    for dtype in (torch.float32,) if args.quick else (torch.float32, torch.bfloat16, torch.float16):
        targets = args.target or (LOW_PRECISION if args.quick or dtype != torch.float32 else tuple(TARGETS))
        rows = []
        for row in compiled_rows(dtype, targets, args.quick):
            cells = map(_cell, row.usages.values())
            print(str(dtype)[6:], row.case, row.launch.name, *cells, sep=" | ", file=sys.stderr, flush=True)
            wrong += problems(row)
            rows.append(row)
        text.append(f"## {str(dtype)[6:]}\n\n{table(rows, targets)}")
    print(document := "\n\n".join(text) + "\n")
    if args.out:
        args.out.write_text(document)
    for problem in wrong:
        print(f"error: {problem}", file=sys.stderr)
    return bool(wrong)


ABOUT = f"""Written by `python -m capsroute._triton.aot --out docs/triton-kernels.md`, Triton {triton.__version__}, on a
machine without a GPU: compiled for these targets, run on none. Registers a thread / KiB of shared memory a block, as
ptxas and LLVM report them. A tile is samples x output capsules x features, of the last stream (`gradients.gradients`)
input capsules x output capsules x features. Where tiles depend on the target, a row has the targets that share them. No
kernel uses matrix instructions: all arithmetic is in float32."""

if __name__ == "__main__":
    sys.exit(main())
