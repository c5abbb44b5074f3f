"""How much memory a computation takes at its peak."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def extra_memory(compute: Callable[[], Iterable[Tensor]]) -> int:
    """The peak in bytes, by torch's allocator, less what is kept: the tensors that it returns."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = compute()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes)) - sum(x.nbytes for x in kept)
