"""How long a step should take: a model with three numbers of the machine, compared with every row that it applies to.

    time = call + max(memory, work) + UNHIDDEN min(memory, work)
    memory = bytes / bandwidth                   bandwidth: that of the ceiling in the same row
    work   = elements * cost / threads           cost: seconds per element on one core, in cache

A core computes while memory works, but the two do not overlap completely: UNHIDDEN is the share of the shorter one
that adds to the time.
"""

from collections.abc import Iterator
from typing import Any

UNHIDDEN = 0.2
LARGE = 100e6  # bytes; the arrays of a step that moves more fit into no cache
CALL = 0.5e-6  # seconds from Python to the first element and back


def predict(elements: int, bytes_per_element: float, bandwidth: float, cost: float, threads: int) -> float:
    """Seconds of one step over arrays that are larger than the caches; bandwidth is in bytes per second."""
    memory = elements * bytes_per_element / bandwidth
    work = elements * cost / threads
    return CALL + max(memory, work) + UNHIDDEN * min(memory, work)


def predictions(results: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """(label, seconds measured, seconds predicted) of each row for which the ceiling and a cost in cache are known."""
    costs = {}
    for row in results["rows"]:
        if row["group"] == "in cache" and (mine := row["contenders"].get("adaptive_c", {}).get("median")):
            costs[row["label"]] = (mine - CALL) / row["task"]["elements"]
    for row in results["rows"]:
        label = {"whole": "whole step"}.get(row["group"], row["label"])
        if row["group"] == "formats":
            label = label.rpartition(", ")[0]
        if row["group"] not in ("rules", "whole", "formats") or label not in costs:
            continue
        mine, top = (row["contenders"].get(name, {}) for name in ("adaptive_c", "ceiling"))
        if "median" not in mine or "median" not in top:
            continue
        n = row["task"]["elements"]
        if n * mine["bytes_per_element"] < LARGE:
            continue
        bandwidth = n * mine["bytes_per_element"] / top["median"]
        threads = results["environment"]["threads"]
        yield (f"{row['group']}: {row['label']}", mine["median"],
               predict(n, mine["bytes_per_element"], bandwidth, costs[label], threads))  # fmt: skip
