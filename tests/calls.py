"""What the private ops were called for."""

from collections import defaultdict

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Record the results of the private ops, by name."""

    def __init__(self):
        super().__init__()
        self.results = defaultdict(list)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.namespace.startswith("capsroute"):
            self.results[op.__name__.split(".")[0]].append(out)
        return out
