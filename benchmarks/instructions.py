"""Instructions of the CPU kernels on five shapes, counted by callgrind: a witness that no noise reaches.

    python benchmarks/instructions.py [--save FILE | --compare FILE]

They repeat to the last one with the same compiler, and tell a slower loop, but nothing of caches. The path is AVX2's:
valgrind knows no AVX-512. Every shape has prior logits, one for each pair of capsules.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from capsroute.bench.registry import CASES, Case

ROOT = Path(__file__).parent.parent
MORE = 1.01  # what `--compare` calls a regression


# So few samples that valgrind takes seconds; a count is nearly proportional to them.
SHAPES = {name: CASES[name]._replace(batch=batch) for name, batch in
          {"mnist": 4, "mnist-1": 1, "comirec": 8, "mind": 64, "segcaps": 256}.items()}  # fmt: skip


def build(folder: Path) -> Path:
    """The program that makes one call."""
    for command in (
        ["cmake", "-S", ROOT, "-B", folder, "-DCAPSROUTE_KERNEL_COUNT=ON"],
        ["cmake", "--build", folder, "--target", "kernel_count", "--parallel"],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "kernel_count"


def count(program: Path, shape: Case, direction: str) -> int:
    """Instructions of one call, less what it takes to make its inputs."""
    valgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=counted"]
    command = [*valgrind, program, "avx2", direction, shape.form, *map(str, shape[1:7])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(re.search(r"Collected : (\d+)", done.stderr)[1])


def main(argv: list[str] | None = None) -> int:
    """Print the counts; with --compare fail for what takes more instructions than before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the counts there")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="fail if a count is over 1 %% more than there")
    args = parser.parse_args(argv)
    if not shutil.which("valgrind"):
        parser.error("there is no valgrind here: apt-get install valgrind")
    before = json.loads(args.compare.read_text()) if args.compare else {}
    program = build(ROOT / "build" / "count")
    print("| shape | pass | instructions | for each vote | before |\n| --- | --- | ---: | ---: | ---: |")
    counts, worse = {}, []
    for name in args.shapes:
        shape = SHAPES[name]
        for direction in ("forward", "backward"):
            label = f"{name} {direction}"
            counts[label] = n = count(program, shape, direction)
            ratio = n / before[label] if label in before else None
            print(
                f"| {name} | {direction} | {n} | {n / shape.votes:.3g} | {f'{ratio:.4f}x' if ratio else ''} |",
                flush=True,
            )
            if ratio and ratio > MORE:
                worse.append(label)
    if args.save:
        args.save.write_text(json.dumps(counts, indent=1))
    for label in worse:
        print(f"error: {label} takes more instructions than before", file=sys.stderr)
    return bool(worse)


if __name__ == "__main__":
    sys.exit(main())
