"""Say what the figures depend on."""

import torch

from capsroute.bench.cli import describe_machine


def pytest_report_header() -> list[str]:
    return [f"{name}: {value}" for name, value in describe_machine(torch.float32).items()]
