"""A benchmark's report against an earlier one: what got slower than the noise of both can explain."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .measure import Result
from .registry import Case

SPREADS = 3  # half quartile distances: twice the standard deviation of a normal distribution
MEMORY = 1.1, 1 << 20  # times, and bytes on top: pages that code takes come and go


class Change(NamedTuple):
    """Of one case and pass of the first implementation.

    Attributes:
        label: the case and the pass.
        time: seconds over those of before, by the same ratio of the other implementations, which did not change.
        noise: by how much that may differ from 1 for no reason.
        memory: peak bytes over those of before; None where they were not measured, or none before.
        slower, larger: whether that is a regression.
    """

    label: str
    time: float
    noise: float
    memory: float | None
    slower: bool
    larger: bool

    def describe(self) -> str:
        grown = ", memory from nothing" if self.larger else ""
        memory = grown if self.memory is None else f", memory {self.memory:.2f}x"
        regressed = " and ".join(word for word, is_so in (("slower", self.slower), ("larger", self.larger)) if is_so)
        verdict = f": {regressed.upper()}" if regressed else ""
        return f"{self.label}: time {self.time:.2f}x, noise ±{self.noise:.0%}{memory}{verdict}"


def load(path: Path) -> dict:
    """A report that `capsroute bench --save` wrote.

    Raises:
        ValueError: if the file is not such a report.
    """
    try:
        report = json.loads(path.read_text())
        if report["command"] != "bench":
            raise ValueError(f"it is of the command {report['command']}")
        _rows(report), report["dtype"], report["machine"]["threads"]  # without which nothing is compared
    except KeyError as error:
        raise ValueError(f"{path} is not what `capsroute bench --save` writes: it lacks {error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not what `capsroute bench --save` writes: {error}") from error
    return report


def check(base: dict, dtype: str, threads: int, keys: Iterable[tuple[Case, str]], first: str) -> None:
    """Check that what will be measured can be compared with a report.

    Raises:
        ValueError: if they share no case and pass, or are of different dtypes, numbers of threads or seeds.
    """
    rows, keys = _rows(base), list(keys)
    for name, before, now in (
        ("dtype", base["dtype"], dtype),
        ("number of threads", base["machine"]["threads"], threads),
        ("seed", *(" and ".join(sorted({str(case.seed) for case, _ in found})) for found in (rows or keys, keys))),
    ):
        if before != now:
            raise ValueError(f"reports can only be compared with the same {name}, got {before} and {now}")
    if not any(first in rows.get(key, {}) for key in keys):
        raise ValueError(f"the reports share no case that {first} was measured in")


def changes(base: dict, report: dict) -> list[Change]:
    """What changed in every case and pass that both reports hold.

    Raises:
        ValueError: as :func:`check`.
    """
    before, now = _rows(base), _rows(report)
    first = report["results"][0]["name"]
    check(base, report["dtype"], report["machine"]["threads"], now, first)
    shared = [key for key, rows in now.items() if first in rows and first in before.get(key, {})]
    return [_change(f"{case.title}, {label}", first, before[case, label], now[case, label]) for case, label in shared]


def unlike(base: dict, report: dict) -> list[str]:
    """What keeps a comparison from telling all: cases that the base lacks, and what else is not as it was."""
    before, now, first = _rows(base), _rows(report), report["results"][0]["name"]
    asked = dict.fromkeys((Case(**row["case"]), row["pass"]) for row in report["results"])
    found = []
    for key in asked:
        lacks = [where for where, rows in (("in it", before), ("measured now", now)) if first not in rows.get(key, {})]
        found += [f"not {where}: {key[0].title}, {key[1]}" for where in lacks]
    for name in ("machine", "gpu", "fused", "torch", "compiler"):
        was, is_now = base["machine"].get(name), report["machine"].get(name)
        if was != is_now:
            found.append(f"another {name}: {was}, now {is_now}")
    return found


def _rows(report: dict) -> dict[tuple[Case, str], dict[str, Result]]:
    """What was measured, by case and pass, by implementation."""
    found: dict[tuple[Case, str], dict[str, Result]] = {}
    for row in report["results"]:
        result = Result(*(row[name] for name in Result._fields))
        if result.seconds is not None:
            key = Case(**row["case"]), row["pass"]
            found.setdefault(key, {})[result.name] = _checked(result)
    return found


def _checked(result: Result) -> Result:
    if not 0 <= result.lower <= result.seconds <= result.upper < math.inf or result.seconds == 0:
        raise ValueError(f"{result.name} took {result.seconds} s, from {result.lower} to {result.upper}")
    if result.peak_bytes is not None and not 0 <= result.peak_bytes < math.inf:
        raise ValueError(f"{result.name} took {result.peak_bytes} bytes")
    return result


def _change(label: str, first: str, before: dict[str, Result], now: dict[str, Result]) -> Change:
    def spread(name: str) -> float:
        return max((result.upper - result.lower) / 2 / result.seconds for result in (before[name], now[name]))

    ratios = {name: now[name].seconds / before[name].seconds for name in now if name in before}
    own = ratios.pop(first)
    machine = statistics.median(ratios.values()) if ratios else 1.0
    # The drift is a median, so one noisy bystander does not move it, nor what is allowed.
    noise = SPREADS * math.hypot(spread(first), statistics.median(map(spread, ratios)) if ratios else 0.0)
    memory, larger = None, False
    was, is_now = before[first].peak_bytes, now[first].peak_bytes
    if was is not None and is_now is not None:
        memory = is_now / was if was else None
        larger = is_now > MEMORY[0] * was + MEMORY[1]
    time = own / machine
    return Change(label, time, noise, memory, time > 1 + noise, larger)
