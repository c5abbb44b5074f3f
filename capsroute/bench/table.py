"""Results as lines of a Markdown table that also reads well as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .measure import Result

FIRST, CELL = 48, 21  # widths
SMALLEST = 1 << 20  # bytes: below it, the pages that code takes are a good part of what is measured


def head(first: str, names: Iterable[str]) -> str:
    """The table's first two lines."""
    names = list(names)
    return _line(first, names) + "\n" + _line("-" * FIRST, ["-" * (CELL - 1) + ":"] * len(names))


def rows(label: str, results: Sequence[Result]) -> str:
    """A line of times with their spread, and one of memory if measured; each also in terms of the first result."""
    lines = [_line(label, [_time(result, results[0]) for result in results])]
    if any(result.peak_bytes is not None for result in results):
        lines.append(_line(f"{label}: extra memory", [_memory(result, results[0]) for result in results]))
    return "\n".join(lines)


def narrowest(lines: Iterable[tuple[str, Sequence[Result]]]) -> str:
    """Where another implementation comes nearest to the first, of labels and results; or nothing."""
    ratios = [
        (result.seconds / first.seconds, result.name, first.name, label)
        for label, (first, *others) in lines
        for result in others
        if first.seconds and result.seconds
    ]
    if not ratios:
        return ""
    ratio, name, first, label = min(ratios)
    return f"\nThe narrowest: {name} takes {ratio:.3g} times as long as {first}, {label}"


def format_seconds(seconds: float) -> str:
    """Three significant digits in s, ms or µs."""
    return _scaled(seconds, (1, "s"), (1e-3, "ms"), (1e-6, "µs"))


def format_bytes(count: int) -> str:
    """Three significant digits in GiB or MiB."""
    return "< 1 MiB" if count < SMALLEST else _scaled(count, (2**30, "GiB"), (2**20, "MiB"))


def _scaled(value: float, *units: tuple[float, str]) -> str:
    size, unit = next((unit for unit in units if value >= unit[0]), units[-1])
    return f"{float(f'{value / size:.3g}'):g} {unit}"


def _time(result: Result, first: Result) -> str:
    if result.seconds is None:
        return result.note
    spread = (result.upper - result.lower) / 2 / result.seconds
    ratio = "" if result is first or first.seconds is None else f", {result.seconds / first.seconds:.3g}x"
    return f"{format_seconds(result.seconds)} ±{spread:.0%}{ratio}"


def _memory(result: Result, first: Result) -> str:
    if result.peak_bytes is None:
        return result.note
    comparable = result is not first and (first.peak_bytes or 0) >= SMALLEST
    ratio = f", {result.peak_bytes / first.peak_bytes:.3g}x" if comparable else ""
    return format_bytes(result.peak_bytes) + ratio


def _line(first: str, cells: Iterable[str]) -> str:
    return f"| {first:{FIRST}} | " + " | ".join(f"{cell:>{CELL}}" for cell in cells) + " |"
