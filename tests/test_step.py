"""The training step of a whole network, fused against reference against compiled."""

import json
import pickle
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import pytest
import torch

from capsroute.bench import compare, measure, step
from capsroute.bench.registry import CASES
from capsroute.nn import CapsNet


def network(backend, distorted=None):
    net = CapsNet((1, 10, 10), 3, channels=4, types=2, hidden=(8,), backend=backend)
    if backend == distorted:
        net.routing.iterations = 1
    return net


def in_this_process(function, *args):
    """What in_fresh_process does, without the seconds that a process takes to import torch."""
    with torch.random.fork_rng(devices=[]):
        return function(*pickle.loads(pickle.dumps(args)))


@pytest.fixture
def batch(monkeypatch):
    monkeypatch.delitem(step.ROUTED_BY, "compiled")  # takes a minute to compile
    monkeypatch.setattr(measure, "in_fresh_process", in_this_process)
    return torch.rand(5, 1, 10, 10), torch.arange(5) % 3


def test_training_steps_are_compared(batch):
    before = torch.random.get_rng_state()
    rows = step.compare_training_step(network, *batch, seconds=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [row["name"] for row in rows] == ["fused", "reference"]
    assert all(row["rounds"] == 3 and row["seconds"] > 0 and row["peak_bytes"] >= 0 for row in rows)
    assert "training step: extra memory" in step.format_rows(rows)
    json.dumps(rows)


def test_a_step_ends_with_the_optimizers(batch):
    one = step._Step("reference", network, *batch)
    before = [x.detach().clone() for x in one.parameters]
    one()
    assert not any(torch.equal(x, y) for x, y in zip(before, one.parameters, strict=True))


def test_memory_is_measured_on_as_many_threads_as_time_is(batch, monkeypatch):
    """In a process of its own; and of a copy of the batch, as sending would move that of the caller."""
    images, sent, threads = batch[0], [], []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(measure, "in_fresh_process", lambda f, *args: sent.append(args) or in_this_process(f, *args))
    step.compare_training_step(network, *batch, seconds=0)
    assert threads == [torch.get_num_threads()] * 2
    assert all(args[2].data_ptr() != images.data_ptr() for args in sent)
    compare.compare(CASES["efficient"], False, ["reference"], dtype=torch.float32, seconds=0, memory=True)
    assert threads == [torch.get_num_threads()] * 3


def test_training_steps_without_a_compiler(batch, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setitem(step.ROUTED_BY, "compiled", "reference")
    rows = step.compare_training_step(network, *batch, seconds=0)
    assert [(row["name"], row["note"]) for row in rows][-1] == ("compiled", "needs no-such-compiler")
    assert "needs no-such-compiler" in step.format_rows(rows)


def test_a_process_that_dies_is_told(batch, monkeypatch):
    def dies(*_):
        raise BrokenProcessPool

    monkeypatch.setattr(measure, "in_fresh_process", dies)
    rows = step.compare_training_step(network, *batch, seconds=0)
    assert [(row["peak_bytes"], row["note"]) for row in rows] == [(None, "its process was killed")] * 2


class Rounded(CapsNet):
    """In mixed precision; the reference's result is off by what that rounds."""

    def forward(self, images, labels):
        with torch.autocast("cpu", torch.bfloat16):
            output = super().forward(images, labels)
        factor = 1.01 if self.routing.backend == "reference" else 1.0
        return output._replace(reconstruction=output.reconstruction * factor)


def rounded(backend):
    return Rounded((1, 10, 10), 3, channels=4, types=2, hidden=(8,), backend=backend)


def test_mixed_precision_may_round_more(batch):
    assert len(step.compare_training_step(rounded, *batch, seconds=0)) == 2


class Half(CapsNet):
    """In float16."""

    def forward(self, images, labels):
        with torch.autocast("cpu", torch.float16):
            return super().forward(images, labels)


def small(kind, backend):
    return kind((1, 10, 10), 10, channels=4, types=1, hidden=(8,), backend=backend)


def test_small_gradients_of_float16_are_kept(batch, monkeypatch):
    """Those of the primary capsules' bias: not scaled they are below what float16 holds."""
    seen, wide = [], []
    for kind, kept in ((Half, seen), (CapsNet, wide)):
        monkeypatch.setattr(step, "check_equal", lambda _, results, *__, kept=kept: kept.append(results))
        torch.manual_seed(0)
        images, labels = torch.rand(128, 1, 10, 10), torch.arange(128) % 10
        step.compare_training_step(partial(small, kind), images, labels, seconds=0)
    for x, y in zip(seen[0][1:], wide[0][1:], strict=True):
        assert (x / step.SCALE - y).norm() < 0.02 * y.norm()


def test_wrong_training_step_is_refused(batch):
    with pytest.raises(compare.DisagreementError, match="fused"):
        step.compare_training_step(partial(network, distorted="auto"), *batch, seconds=0)
