"""What every test runs under, poisoned allocations, a fixed seed, and the fused backends; what several begin with."""

import os

import hypothesis
import interpreter
import pytest
import torch
from commands import train_tiny, write_idx
from problems import FUSED

import capsroute
from capsroute import _backends

# No database and no random start: a red test is red on every run. No deadline: timings are not tested here.
hypothesis.settings.register_profile("capsroute", derandomize=True, deadline=None, database=None, max_examples=60)
hypothesis.settings.load_profile("capsroute")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the tensors of the tests are")
    parser.addoption(
        "--interpreted",
        type=int,
        default=2,
        metavar="N",
        help="of each test that Triton's interpreter runs take N parametrizations, evenly spread; 0: all",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreted(factor): many times what Triton's interpreter takes of other tests")
    config.addinivalue_line("markers", "not_interpreted: about what Triton's interpreter does not have, or is slow at")
    if config.getoption("device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    elif not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch.cuda.is_available() is False here")


def pytest_generate_tests(metafunc):
    """`fused`: each fused backend, for what only those must show: errors against the reference, bits, memory.
    `backend`: those and the reference, for the sentences of the contract, which all obey.
    """
    names = fused_backends(metafunc.config.getoption("device"))
    if "fused" in metafunc.fixturenames:
        metafunc.parametrize("fused", names, indirect=True)
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["reference", *names], indirect=True)


def fused_backends(device: str) -> list[str]:
    if device == "cpu":
        return FUSED
    u = torch.empty(1, 1, 1, device=device)
    served = [name for name, backend in _backends.BACKENDS.items() if backend.serves(u, None)[0]]
    return [name for name in served if name != "reference"]


def pytest_collection_modifyitems(config, items):
    """The interpreter needs a second for what a kernel does in a millisecond: it runs some of each test."""
    if config.getoption("device") != "cpu":
        return
    by_test, left_out = {}, set()
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        marked = item.get_closest_marker("interpreted")
        if "triton" not in (parameters.get("fused"), parameters.get("backend")) and not marked:
            continue
        if item.get_closest_marker("not_interpreted"):
            left_out.add(item)
        else:
            by_test.setdefault((item.path, item.originalname), []).append(item)
    for same in by_test.values():
        marked = same[0].get_closest_marker("interpreted")
        few = config.getoption("interpreted") * (marked.args[0] if marked else 1)
        kept = {(2 * k + 1) * len(same) // (2 * few) for k in range(few)} if few else range(len(same))
        left_out.update(item for k, item in enumerate(same) if k not in kept)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def threads():
    """torch.set_num_threads, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    """Where scratch per thread would count, or there is so little work that several only wait for each other."""
    threads(1)


@pytest.fixture(autouse=True, scope="session")
def device(request):
    """The tests' tensors are there, where they do not say otherwise."""
    name = request.config.getoption("device")
    if name == "cpu":
        interpreter.patch()
    else:
        torch.set_default_device(name)
    return name


@pytest.fixture(autouse=True, scope="session")
def poisoned_allocations():
    """Fresh tensors hold NaN, those that C++ ops allocate included, so an output left unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()


@pytest.fixture
def any_algorithms():
    """What users run: torch.compile takes others where they need not be deterministic."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


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


@pytest.fixture
def cpu() -> str:
    return can_run("cpu")


@pytest.fixture
def fused(request) -> str:
    return can_run(request.param)


@pytest.fixture
def backend(request) -> str:
    return can_run(request.param)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CAPSROUTE_DATA", raising=False)
        return train_tiny(tmp_path_factory.mktemp("runs") / "deep" / "run")


@pytest.fixture
def mnist_dir(tmp_path):
    return write_idx(tmp_path)
