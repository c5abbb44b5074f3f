"""What `make gpu-proof` shows of the CUDA kernels without a GPU, too slow for every day.

python tests/cuda_proof.py emulate    the suite of the other backends through the emulated kernels, all of it
python tests/cuda_proof.py sanitize   the emulated kernels under Thread-, Address- and UndefinedBehaviorSanitizer
python tests/cuda_proof.py mutate     each meeting left out, each bound loosened: some case fails
python tests/cuda_proof.py compile    every kernel for every target: registers, nothing in local memory;
                                      writes docs/cuda-kernels.md
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import emulated

ROOT = emulated.ROOT
CUDA = ROOT / "csrc" / "cuda"
PAGE = ROOT / "docs" / "cuda-kernels.md"
STORAGE = {"float32": "float", "float64": "double", "bfloat16": "BFloat16", "float16": "Half"}
TARGETS = (75, 80, 86, 89, 90, 100, 120)
LOCAL_ALLOWED = (75,)
SUITE = ("gradients", "routing", "contract", "reproducibility", "compile", "vmap", "transforms")  # the longest first


def program(sanitize: str = "") -> Path:
    folder = ROOT / "build" / ("emulated" if not sanitize else f"emulated-{sanitize.split(',')[0]}")
    return emulated.build("cuda_test", folder, f"-DCAPSROUTE_SANITIZE={sanitize}") / "cuda_test"


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run([str(x) for x in command], capture_output=True, text=True)


# Sites: meetings of a block and bound checks


def sites_in_source() -> set[str]:
    """As the runtime names them: kind, FILE:LINE, and the first argument of a bound."""
    found = set()
    for path in sorted(CUDA.glob("*.cuh")):
        if path.name == "portable.cuh":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "CAPSROUTE_SYNC()" in line:
                found.add(f"barrier {path.name}:{number}")
            for bound in re.findall(r"CAPSROUTE_WITHIN\(([^,]+),", line):
                found.add(f"bound {path.name}:{number} {bound}")
    return found


def cases_by_site() -> dict[str, list[int]]:
    """For each site, the cases of cuda_test that reach it."""
    reached: dict[str, list[int]] = {}
    case = -1
    for line in run(program(), "--sites").stdout.splitlines():
        if line.startswith("case "):
            case = int(line.removeprefix("case "))
        elif line.startswith(("barrier ", "bound ")):
            reached.setdefault(line, []).append(case)
    return reached


def mutate() -> list[str]:
    """The sites whose mutation no case notices."""
    plain, thread, address = program(), program("thread"), program("address,undefined")

    def noticed(site: str, cases: list[int]) -> str | None:
        ways = (plain, thread) if site.startswith("barrier") else (plain, address)
        tries = ((way, case) for way in ways for case in cases)
        return next((f"{way.parent.name}, case {case}" for way, case in tries if run(way, case, site).returncode), None)

    sites = sorted(cases_by_site().items())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(dict(sites), pool.map(lambda x: noticed(*x), sites), strict=True))
    for site, by in found.items():
        print(f"{site}: {by or 'NOTICED BY NOBODY'}")
    return [site for site, by in found.items() if not by]


def sanitize() -> list[str]:
    failed = []
    cases = re.findall(r"case (\d+)", run(program(), "--sites").stdout)
    for sanitizer in ("thread", "address,undefined"):
        way = program(sanitizer)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            all_done = pool.map(run, repeat(way), cases, repeat("none"))
        for case, done in zip(cases, all_done, strict=True):
            if done.returncode:
                print(done.stdout[-2000:], done.stderr[-4000:])
                failed.append(f"-fsanitize={sanitizer}, case {case}")
        print(f"-fsanitize={sanitizer}: {len(cases)} cases, {len(failed)} failed in all", flush=True)
    return failed


# The suite


def suite(names: Sequence[str], few: int = 0, leave_out: Sequence[str] = ()) -> subprocess.CompletedProcess:
    """The tests that every backend passes, through the emulated kernels: `few` parametrizations of each, or all (0).

    But those of the sizes at which the CPU's kernels change their ways, which are nothing to these and take minutes.
    """
    files = [ROOT / "tests" / f"test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-p", "emulated", "--emulated", str(few), "-q", "-x", *files]
    command += ["-k", " and ".join(f"not {name}" for name in ("large_sizes", *leave_out))]
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "CAPSROUTE_TEST_BACKEND": "emulated", "PYTHONPATH": path}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


def emulate() -> list[str]:
    emulated.library()  # built once, before it is loaded by several
    failed = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, done in zip(SUITE, pool.map(lambda name: suite([name]), SUITE), strict=True):
            said = done.stdout[-6000:] if done.returncode else done.stdout.splitlines()[-1]
            print(f"emulated, test_{name}.py: {said}", flush=True)
            failed += [f"emulated, test_{name}.py"] if done.returncode else []
    return failed


# Compilation


def compile_for(storage: str, target: int, folder: Path) -> list[tuple]:
    """(kernel, target, registers, bytes of local memory) of every kernel of a storage type.

    What is spilled lies there, and what no register can hold: an object with a pointer into itself, an array with an
    index that is not known.
    """
    command = ["nvcc", "-std=c++17", "-cubin", f"-arch=sm_{target}", "-Xptxas", "-v"]
    command += [f"-DCAPSROUTE_STORAGE={STORAGE[storage]}", f"-DCAPSROUTE_DTYPE={storage}"]
    done = run(*command, "-o", folder / f"{storage}-{target}.cubin", CUDA / "kernels.cu")
    assert done.returncode == 0, done.stderr
    text = subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True, check=True).stdout
    kernels = re.findall(
        r"Compiling entry function '(?:void )?([^']*>)\([^']*'.*?(\d+) bytes stack frame.*?Used (\d+) registers",
        text,
        re.DOTALL,
    )
    plain = re.compile(r"capsroute::(cuda::)?")
    return [(plain.sub("", name), target, int(used), int(local)) for name, local, used in kernels]


def readable(kernel: str) -> str:
    kernel = re.sub(r".*&\(void (.*?)\(.*", r"\1", kernel)  # what a kernel around any function is around
    for number, source in enumerate(("made", "keys", "given")):
        kernel = kernel.replace(f"(Source){number}", source)
    for number, direction in enumerate(("forward", "backward")):
        kernel = kernel.replace(f"(Direction){number}", direction)
    return kernel.replace(", true>", ", over i>").replace(", false>", ", over j>").replace("_kernel", "")


def most_threads(kernel: str) -> int:
    """The launch bounds of csrc/cuda: as many threads as a block may have."""
    if kernel.startswith(("pass", "route")):
        double, backward = "double" in kernel, "backward" in kernel
        return 32 * ((8 if backward else 12) if double else (12 if backward else 16))
    return 128 if kernel.startswith(("bias", "logits")) else 256


def compile_all() -> list[str]:
    folder = ROOT / "build" / "cubins"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(storage, target, folder) for storage in STORAGE for target in TARGETS]
    with ThreadPoolExecutor(2) as pool:
        rows = [row for part in pool.map(lambda job: compile_for(*job), jobs) for row in part]
    table: dict[str, dict[int, tuple[int, int]]] = {}
    for kernel, target, used, local in rows:
        table.setdefault(readable(kernel), {})[target] = used, local
    failed = []
    lines = [
        "# The CUDA kernels, as compiled",
        "",
        "Registers of a thread (and bytes that lie in local memory, where any do), by target, from `ptxas -v` of nvcc "
        + re.search(r"release ([\d.]+)", run("nvcc", "--version").stdout)[1]
        + ". Made by `python tests/cuda_proof.py compile`.",
        "Nothing here was run: no GPU has been at hand. Blocks: how many blocks of the largest size the registers of a "
        "multiprocessor (65536) hold.",
        "",
        "| kernel | threads | " + " | ".join(f"sm_{target}" for target in TARGETS) + " | blocks |",
        "|---" * (len(TARGETS) + 3) + "|",
    ]
    for kernel, by_target in sorted(table.items()):
        threads = most_threads(kernel)
        cells = [f"{used} ({local} B)" if local else str(used) for used, local in by_target.values()]
        for target, (used, local) in by_target.items():
            if used * threads > 65536 or (local and target not in LOCAL_ALLOWED):
                failed.append(f"{kernel} on sm_{target}: {used} registers, {local} bytes of local memory")
        blocks = min(65536 // (-(-used // 8) * 8 * threads) for used, _ in by_target.values())
        lines.append(f"| `{kernel}` | {threads} | " + " | ".join(cells) + f" | {blocks} |")
    PAGE.write_text("\n".join(lines) + "\n")
    print(f"{len(rows)} kernels compiled; {PAGE.relative_to(ROOT)} written")
    return failed


def timed(what: str) -> list[str]:
    if what == "compile" and not shutil.which("nvcc"):
        print("compile: skipped, nvcc was not found")
        return []
    begin = time.monotonic()
    failed = STEPS[what]()
    print(f"{what}: {len(failed)} failed, {time.monotonic() - begin:.0f} s", flush=True)
    return failed


STEPS = {"emulate": emulate, "sanitize": sanitize, "mutate": mutate, "compile": compile_all}


def main() -> None:
    failed = [line for what in sys.argv[1:] or STEPS for line in timed(what)]
    print("\n".join(failed))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
