"""The bytes that each Triton launch says it moves are the bytes that it moves, counted in the interpreter."""

import pytest
import torch
from interpreter import watch
from problems import EVERY, FORMS, cases, random_problem

from capsroute._triton import tuning
from capsroute.bench.registry import CASES, Case, make_problem
from capsroute.bench.traffic import fewest, planned, traffic


@pytest.fixture(autouse=True)
def interpreted(device):
    if device != "cpu":
        pytest.skip("bytes are counted by the interpreter, which runs on the CPU")


# What nothing masks or forbids: those lanes take no part, and the formulas are for the most.
COUNTED = {name: options for name, options in EVERY.items() if not (options.get("mask") or options.get("forbid"))}


def launches_of(monkeypatch):
    """Every launch of the calls that follow, with the bytes counted."""
    from capsroute._triton import problem

    found = []

    def run(launch):
        original(launch)
        found.append((launch, watch.moved))

    original = problem.Launch.run
    monkeypatch.setattr(problem.Launch, "run", run)
    return found


@pytest.fixture
def edges(monkeypatch):
    """Tiles so small that small shapes have several, and partial ones, in each direction."""
    monkeypatch.setattr(
        tuning,
        "DEFAULT",
        tuning.Tuning((1, 4), (1, 4), (1, 4), (1, 1), (1, 4), row=16, tiled=16, work=1, groups=3, programs=2),
    )


@pytest.mark.interpreted(4)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", ["plain", "logits of the layer", "in, bias", "pass, in", "leaky"])
def test_every_launch_moves_what_its_formula_says(monkeypatch, edges, form, options):
    if (form, options) not in cases(COUNTED):
        pytest.skip("a weight [O, D] and no other tensor say nothing of J")
    found = launches_of(monkeypatch)
    random_problem((3, 4, 3, 3, 5), form=form, dtype=torch.float32, **COUNTED[options]).gradients("triton")
    assert len(found) >= 3
    for launch, moved in found:
        assert moved == launch.traffic, f"{launch.name} {launch.grid}"


@pytest.mark.interpreted(2)
@pytest.mark.parametrize("name", CASES)
def test_the_registrys_shapes_move_what_the_formulas_say(monkeypatch, name):
    """With fewer samples and input capsules, which the formulas count exactly."""
    case = CASES[name]
    problem = make_problem(
        case._replace(batch=min(3, case.batch), inputs=min(3, case.inputs), outputs=min(70, case.outputs))
    )
    steps, _ = planned(problem, backward=True)
    found = launches_of(monkeypatch)
    for step in steps:
        step.run()
    assert len(found) >= 3
    for launch, moved in found:
        assert moved == launch.traffic, f"{launch.name} {launch.grid}"


def test_traffic_of_mnist():
    found = traffic(CASES["mnist"], backward=False)
    assert found.fused <= 105e6  # 160 MB were asked for
    assert found.launches == 6


def test_the_fewest_bytes_are_of_what_is_read_and_written_once():
    """A backward comes after its forward, which leaves it s of each pass."""
    problem = make_problem(Case("", 2, 3, 4, 5, 6))
    inputs, v, s = 4 * (2 * 3 * 4 + 3 * 5 * 6 * 4), 4 * 2 * 5 * 6, 3 * 4 * 2 * 5 * 6
    assert fewest(problem, False) == inputs + v
    assert fewest(problem, True) == 2 * (inputs + v + s) + inputs


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("mnist-1", "comirec", "comirec-rechub")])
@pytest.mark.parametrize("backward", [False, True])
def test_less_is_moved_than_by_eager_pytorch(name, backward):
    """At B = 1 and where a weight is larger than all votes it is not so: the weight is read in every pass."""
    found = traffic(CASES[name], backward)
    assert found.fewest < found.fused < found.eager
