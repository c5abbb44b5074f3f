"""Compare whole training steps of a network: forward, loss, backward and optimizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..nn import CapsNetLoss
from . import table
from .compare import TOLERANCE, check_equal
from .measure import Result, alternate, peak_growth, with_memory
from .registry import compiled, no_compiler

ROUTED_BY = {"fused": "auto", "reference": "reference", "compiled": "reference"}
MIXED = 4  # times what rounding explains of one operator: in mixed precision every layer rounds its results

SCALE = 1024.0  # of the loss in float16, whose small gradients would be lost; AdamW does not mind

ModelFactory = Callable[[str], nn.Module]


class _Step:
    """A network with its optimizer; a call trains it one step."""

    def __init__(self, name: str, model_factory: ModelFactory, images: Tensor, labels: Tensor):
        self.model = model_factory(ROUTED_BY[name])
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters)
        self.scale = 1.0
        loss_of = CapsNetLoss()

        def loss() -> Tensor:
            return loss_of(self.model(images, labels), images, labels)

        self.loss = compiled(loss) if name == "compiled" else loss

    def __call__(self) -> list[Tensor]:
        """One step; returns the loss and the gradients, which are `scale` times those of the loss."""
        self.optimizer.zero_grad()
        loss = self.loss()
        (loss * self.scale).backward()
        self.optimizer.step()
        return [loss.detach(), *(x.grad for x in self.parameters)]


def compare_training_step(
    model_factory: ModelFactory, images: Tensor, labels: Tensor, *, seconds: float = 10.0
) -> list[dict]:
    """Time and memory of a training step with the fused routing, with the reference, and with that compiled.

    Memory is measured in fresh processes: call this from a module's functions or below
    `if __name__ == "__main__"`, as for every use of multiprocessing.

    Args:
        model_factory: given a backend, makes the network; called with images and labels it returns what
            :class:`capsroute.nn.CapsNetLoss` takes. Picklable.
        images, labels: one batch, as the network and the loss take it.
        seconds: about how long to time.

    Returns:
        A dict of the fields of :class:`capsroute.bench.measure.Result` for each, "fused" first; without a compiler,
        that of "compiled" has only a note. `peak_bytes` leaves out parameters, their gradients and the optimizer's
        state.

    Raises:
        DisagreementError: if a loss or gradient differs from the reference's.
    """
    reason = no_compiler()
    names = [name for name in ROUTED_BY if not (reason and name == "compiled")]
    with torch.random.fork_rng(devices=[]):  # leave the caller's random state as it is
        steps = {name: _Step(name, model_factory, images, labels) for name in names}
    for step in steps.values():
        step.model.load_state_dict(steps["reference"].model.state_dict())
    with torch.no_grad():  # in mixed precision not that of the gradients
        dtype = steps["reference"].model(images[:1], labels[:1]).reconstruction.dtype
    for step in steps.values():
        step.scale = SCALE if dtype == torch.float16 else 1.0
    rounding = MIXED * TOLERANCE[dtype] if dtype.itemsize < 4 else 0.0
    first = {name: step() for name, step in steps.items()}
    for name, results in first.items():
        check_equal(name, results, first["reference"], rounding)
    del first
    rows = []
    for name, timing in alternate(steps, seconds).items():
        batch = images.clone(), labels.clone()  # sending a tensor moves its storage to shared memory
        threads = torch.get_num_threads()
        result = with_memory(Result(name, *timing), _step_memory, name, model_factory, *batch, threads)
        rows.append(result._asdict())
    return rows + [Result(name, note=reason)._asdict() for name in ROUTED_BY if name not in names]


def format_rows(rows: list[dict]) -> str:
    """The rows of :func:`compare_training_step` as a table."""
    results = [Result(**row) for row in rows]
    return table.head("", [row.name for row in results]) + "\n" + table.rows("training step", results)


def _step_memory(name: str, model_factory: ModelFactory, images: Tensor, labels: Tensor, threads: int) -> int:
    torch.set_num_threads(threads)
    step = _Step(name, model_factory, images, labels)

    def warm_up() -> None:
        step()  # also makes the optimizer's state
        step.optimizer.zero_grad()

    return peak_growth(warm_up, step)
