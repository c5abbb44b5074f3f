"""The registry of `capsroute bench` for pytest-benchmark; results are checked before they are timed.

One shape: `pytest benchmarks -k "case:mnist-forward and not compiled"`. One thread: OMP_NUM_THREADS=1.
"""

import pytest

from capsroute.bench.compare import prepare
from capsroute.bench.registry import CASES, IMPLEMENTATIONS, run


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("case", CASES.values(), ids=[f"case:{name}" for name in CASES])  # not emnist too
def test_routing(benchmark, case, backward, name):
    benchmark.group = case.label(backward)
    prepared = prepare(case, backward, [name])
    if name in prepared.left_out:
        pytest.skip(prepared.left_out[name])
    benchmark(run, prepared.forwards[name], prepared.problem, backward)
