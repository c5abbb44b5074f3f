"""What every test runs under: poisoned allocations, a fixed seed, and the fused backends."""

import os

import hypothesis
import pytest
import torch
from problems import FUSED

import capsroute

# No database and no random start: a red test is red on every run. No deadline: timings are not tested here.
hypothesis.settings.register_profile("capsroute", derandomize=True, deadline=None, database=None, max_examples=60)
hypothesis.settings.load_profile("capsroute")


@pytest.fixture(autouse=True, scope="session")
def poisoned_allocations():
    """Fresh tensors hold NaN, those that C++ ops allocate included, so an output left unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def can_run(backend: str) -> str:
    """A backend that cannot run is a failure, unless this install has no kernels on purpose."""
    can, why = capsroute.backends()[backend]
    if not can and os.environ.get("CAPSROUTE_NO_EXT") == "1":
        pytest.skip(why)
    assert can, why
    return backend


@pytest.fixture(params=FUSED)
def fused(request) -> str:
    """Each fused backend, for what only those must show: errors against the reference, bits, memory."""
    return can_run(request.param)


@pytest.fixture(params=["reference", *FUSED])
def backend(request) -> str:
    """Every backend, for the sentences of the contract, which all obey."""
    return can_run(request.param)
