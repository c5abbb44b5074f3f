"""`make gpu-check`: everything that can be checked on a GPU, ending in a report that can be pasted into an issue.

It runs the test suite and the benchmarks on the GPU, the latter against `torch.compile` of the reference, and, where
NVIDIA's compute-sanitizer is installed, a part of the suite under it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from capsroute import backends
from capsroute.bench.machine import describe_machine

LINES = 25  # of each step's output in the report
ON_CPU = ("batches", "checkpoint", "cli", "data", "report", "resume", "training")  # their tensors are
PYTEST = (sys.executable, "-m", "pytest", "--device", "cuda", "-q", "--no-header", "-p", "no:cacheprovider")


def steps() -> Iterator[tuple[str, list[str]]]:
    yield "tests", [*PYTEST, "tests", *(f"--ignore=tests/test_{name}.py" for name in ON_CPU)]
    yield "benchmarks", [sys.executable, "-m", "capsroute", "bench", "--device", "cuda", "--case", "all", "--memory"]
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck") if shutil.which("compute-sanitizer") else ():
        few = [*PYTEST, "tests/test_triton.py", "tests/test_routing.py", "-x"]
        few += ["-k", "edge or several or (every_option and cuda and all)"]
        # each tensor in memory of its own: what leaves one must not lie in another
        command = [
            "env",
            "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "1",
        ]
        yield f"compute-sanitizer {tool}", [*command, *few]


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu-check: error: torch sees no GPU here", file=sys.stderr)
        return 2
    torch.set_default_device("cuda")
    about = describe_machine(torch.float32) | {name: why for name, (_, why) in backends().items()}
    report = ["## capsroute on a GPU", "\n".join(f"- {name}: {value}" for name, value in about.items())]
    failed = False
    for name, command in steps():
        print(f"gpu-check: {name}", file=sys.stderr, flush=True)
        begin = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        failed |= done.returncode != 0
        verdict = "passed" if done.returncode == 0 else f"FAILED ({done.returncode})"
        tail = "\n".join(done.stdout.splitlines()[-LINES:])
        report.append(f"### {name}: {verdict}, {time.monotonic() - begin:.0f} s\n\n```\n{tail}\n```")
    if not shutil.which("compute-sanitizer"):
        report.append("compute-sanitizer: not installed, not run")
    print("\n\n".join(report))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
