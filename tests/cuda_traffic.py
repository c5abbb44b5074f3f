"""The bytes of global memory that the CUDA kernels move, counted by the emulator at shapes in use.

python tests/cuda_traffic.py    writes docs/cuda-traffic.md
"""

from __future__ import annotations

import emulated

from capsroute.bench import traffic
from capsroute.bench.registry import CASES, Case, make_problem, routed, run

PAGE = emulated.ROOT / "docs" / "cuda-traffic.md"
# The others take minutes to emulate.
COUNTED = ("mnist", "mnist-1", "efficient", "comirec", "comirec-shared", "comirec-rechub")
ABOUT = """# Bytes of the CUDA kernels

Global memory loaded and stored in float32, counted by the emulation, load by load and store by store (a load that is
the same for a whole warp counts once); what a cache serves counts too. Fewest possible: each input read and each result
written once. Made by `python tests/cuda_traffic.py`; `capsroute bench --traffic` has the Triton kernels and eager
PyTorch. No GPU has been at hand, so nothing here is a time.

| case | launches | moved | fewest possible |
|---|---:|---:|---:|
"""


def row(case: Case, backward: bool) -> str:
    problem = make_problem(case)
    emulated.take_launches()
    run(lambda problem: routed(problem, "emulated"), problem, backward)
    launches = emulated.take_launches()
    moved, fewest = sum(x.loaded + x.stored for x in launches), traffic.fewest(problem, backward)
    label = case.label(backward)
    return f"| {label} | {len(launches)} | {moved / 1e6:.4g} MB, {moved / fewest:.3g}x | {fewest / 1e6:.4g} MB |\n"


def main() -> None:
    emulated.register()
    rows = [row(CASES[name], backward) for name in COUNTED for backward in (False, True)]
    PAGE.write_text(ABOUT + "".join(rows))
    print(f"{len(rows)} rows; {PAGE.relative_to(emulated.ROOT)} written")


if __name__ == "__main__":
    main()
