"""Makes tables in Markdown, and pictures, from what the suite measured (the JSON file)."""

from pathlib import Path
from typing import Any

from .._native import counted
from .model import predictions

OURS = "adaptive_c"
NOTHING = "-"
TITLES = {
    "sizes": "AdamW in float32, by the number of elements",
    "rules": "Every rule in float32",
    "in cache": "In cache, on one thread",
    "float64": "AdamW in float64",
    "whole": "The whole step: unscale, clip to the global norm, AdamW, average, bfloat16 copy, zero the gradient",
    "formats": "AdamW with narrow numbers",
    "lists": "AdamW over lists of arrays",
    "drop-in": "The class for torch's tensors, AdamW",
    "threads": "AdamW by the number of threads",
    "rows": "Gradients of a few rows of a table with 64 columns, float32",
    "import": "Import time",
    "memory": "Peak memory of AdamW, arrays and gradients included",
}


def _time(seconds: float, *beside: float) -> str:
    """A time and, in brackets, others in the unit of the first."""
    units = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
    unit, name = next((pair for pair in units if seconds >= pair[0]), units[-1])
    brackets = f" ({'-'.join(f'{x / unit:.3g}' for x in beside)})" if beside else ""
    return f"{seconds / unit:.3g} {name}{brackets}"


def ratio(compared: dict[str, float] | None) -> str:
    """How many times as long a contender takes, with the interval; "=" if the interval holds 1."""
    if compared is None:
        return NOTHING
    if compared["low"] <= 1 <= compared["high"]:
        return "=" if compared["high"] - compared["low"] < 0.1 else f"= [{compared['low']:.2f}, {compared['high']:.2f}]"
    digits = 2 if compared["ratio"] < 10 else 0 if compared["ratio"] >= 100 else 1
    low, middle, high = (f"{compared[key]:.{digits}f}" for key in ("low", "ratio", "high"))
    return f"{middle}x [{low}, {high}]"


def _cell(facts: dict[str, Any]) -> str:
    for why in ("missing", "failed", "wrong"):
        if why in facts:
            return why
    return ratio(facts.get("times_ours"))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One group as a Markdown table: our time, then how many times as long each of the others took."""
    group = rows[0]["group"]
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"] if name != OURS))
    if group == "memory":
        names = [OURS, *(name for name in names if name != "ceiling")]
        lines = [f"| elements | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
        for row in rows:
            found = [row["contenders"].get(name, {}) for name in names]
            cells = [f"{x['peak_bytes_per_element']:.1f} bytes" if "peak_bytes_per_element" in x else _cell(x)
                     for x in found]  # fmt: skip
            lines.append(f"| {row['label']} | {' | '.join(cells)} |")
        return lines
    if group == "import":
        libraries = sorted(rows[0]["contenders"].items(), key=lambda item: item[1]["median"])
        return ["| library | seconds after NumPy |", "|---|---|",
                *(f"| {name} | {_time(facts['median'])} |" for name, facts in libraries)]  # fmt: skip
    names.sort(key="ceiling".__eq__)
    heads = ["ceiling: share reached" if name == "ceiling" else name for name in names]
    lines = [f"| {' | '.join(['', OURS, 'ns per element', *heads])} |", f"|---|---|---|{'---|' * len(names)}"]
    for row in rows:
        mine = row["contenders"].get(OURS, {})
        if "median" not in mine:
            lines.append(f"| {row['label']} | {_cell(mine)} |{' |' * (1 + len(names))}")
            continue
        cells = [_time(mine["median"], *mine["quartiles"]), f"{mine['median'] / row['task']['elements'] * 1e9:.3f}"]
        lines.append(
            f"| {row['label']} | {' | '.join([*cells, *(_cell(row['contenders'].get(n, {})) for n in names)])} |"
        )
    return lines


def markdown(results: dict[str, Any]) -> str:
    env = results["environment"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault(row["group"], []).append(row)
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    lines = [
        "# adaptive-c bench",
        "",
        f"{env['processor']}, {counted(env['processors'], 'processor')}, {counted(env['threads'], 'thread')}, "
        f"{env['system']}; {env['instruction_set']} build by {env['compiler']} with {env['flags']}; "
        f"commit {env['commit']}; Python {env['python']}, {versions}.",
        "",
        f"Medians of {results['settings']['rounds']} rounds, each contender in a process of its own, in turn; in round "
        'brackets quartiles. "2.00x" means that the other takes twice as long as adaptive_c, in square brackets its '
        '95% interval; "=" that the interval holds 1; the ceiling is a loop that moves the same '
        "bytes with next to no arithmetic, in the same run. Each contender's results were checked against the "
        "reference first (in bfloat16 parameters three updates hide in rounding). Who takes ten times as long has 5 "
        "rounds.",
    ]  # fmt: skip
    for group, rows in groups.items():
        lines += ["", f"## {TITLES[group]}", "", *table(rows)]
    if found := list(predictions(results)):
        lines += ["", "## The model", "", "| row | measured | predicted | |", "|---|---|---|---|"]
        lines += [f"| {label} | {_time(measured)} | {_time(predicted)} | {predicted / measured - 1:+.0%} |"
                  for label, measured, predicted in found]  # fmt: skip
    return "\n".join(lines) + "\n"


# --- pictures ----------------------------------------------------------------------------------------------------


def pictures(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write PNG and SVG files of everything that there are rows for; raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    paths = []
    for draw in (sizes, roofline, whole_step, threads):
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        if draw(figure.subplots(), results):
            for ending in ("png", "svg"):
                path = folder / f"adaptive-c-bench-{draw.__name__}.{ending}"
                figure.savefig(path, dpi=110, metadata={"Date": None} if ending == "svg" else None)
                paths.append(path)
    return paths


def _rows(results: dict[str, Any], group: str) -> list[dict[str, Any]]:
    return [row for row in results["rows"] if row["group"] == group and "median" in row["contenders"].get(OURS, {})]


def _curves(axis: Any, rows: list[dict[str, Any]], x: list[float], scale: list[float]) -> None:
    """Draw a line for each contender: ours is thick, the ceiling dotted."""
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
    for i, name in enumerate(names):
        points = [(x[j], row["contenders"][name]["median"] * scale[j]) for j, row in enumerate(rows)
                  if "median" in row["contenders"].get(name, {})]  # fmt: skip
        style = {"color": "black", "linewidth": 2.5, "zorder": 5} if name == OURS else \
            {"color": "black", "linestyle": ":", "linewidth": 1.5} if name == "ceiling" else \
            {"color": f"C{i % 10}", "linewidth": 1.2, "linestyle": "-" if i < 10 else "--"}  # fmt: skip
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)


def sizes(axis: Any, results: dict[str, Any]) -> bool:
    """Nanoseconds per element over the number of elements."""
    rows = _rows(results, "sizes")
    if len(rows) < 2:
        return False
    x = [float(row["task"]["elements"]) for row in rows]
    _curves(axis, rows, x, [1e9 / n for n in x])
    axis.set(xscale="log", yscale="log", xlabel="elements of one array", ylabel="ns per element",
             title="One AdamW step in float32")  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.grid(alpha=0.3, which="both")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return True


def roofline(axis: Any, results: dict[str, Any]) -> bool:
    """Time per element over bytes per element, for every rule and format at the largest size, and the ceiling."""
    rows = [row for group in ("rules", "formats", "whole") for row in _rows(results, group)]
    rows = [row for row in rows if row["task"]["elements"] == results["settings"]["large"]]
    points = []
    for row in rows:
        mine, top, n = row["contenders"][OURS], row["contenders"].get("ceiling", {}), row["task"]["elements"]
        if "median" in top:
            points.append((mine["bytes_per_element"], mine["median"] / n * 1e9, top["median"] / n * 1e9, row))
    if not points:
        return False
    points.sort(key=lambda point: point[:2])
    slope = sorted(top / size for size, _, top, _ in points)[len(points) // 2]
    end = 1.05 * max(size for size, *_ in points)
    axis.plot([0, end], [0, slope * end], "k:", label=f"the ceiling, {1 / slope:.0f} GB/s")
    axis.plot([p[0] for p in points], [p[2] for p in points], "k_", markersize=9, label="the ceiling of a row")
    for group, colour in (("rules", "C0"), ("formats", "C1"), ("whole", "C2")):
        some = [p for p in points if p[3]["group"] == group]
        axis.plot([p[0] for p in some], [p[1] for p in some], "o", color=colour, label={"rules": "rules, float32",
                  "formats": "AdamW, narrow numbers", "whole": "the whole step"}[group])  # fmt: skip
    last: dict[float, float] = {}
    high = max(p[1] for p in points)
    for size, mine, _, row in points:  # names that share a column are put one above the other
        y = max(mine, last.get(size, -1.0) + 0.03 * high)
        last[size] = y
        name = row["label"].replace(" parameters", "").replace(" state", "").rpartition(", ")
        label = row["label"] if row["group"] == "rules" else "whole step" if row["group"] == "whole" else name[0]
        axis.annotate(label, (size, mine), (size + 0.4, y), fontsize=7, va="center", annotation_clip=False)
    axis.set(xlim=(0, end * 1.12), ylim=(0, None), xlabel="bytes per element, read and written",
             ylabel="ns per element", title=f"Steps of {results['settings']['large']:,} elements")  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", frameon=False)
    return True


def whole_step(axis: Any, results: dict[str, Any]) -> bool:
    """Bars with quartiles, one for each contender."""
    rows = _rows(results, "whole")
    if not rows:
        return False
    bars = [(name, facts) for name, facts in rows[0]["contenders"].items() if "median" in facts]
    bars.sort(key=lambda item: -item[1]["median"])
    for i, (name, facts) in enumerate(bars):
        middle, (low, high) = facts["median"] * 1e3, (q * 1e3 for q in facts["quartiles"])
        axis.barh(i, middle, xerr=[[middle - low], [high - middle]], capsize=4,
                  color={"ceiling": "0.7", OURS: "C0"}.get(name, "C1"))  # fmt: skip
        share = "" if (found := ratio(facts.get("times_ours"))) == NOTHING else f", {found}"
        axis.text(0, i, f"  {name}: {middle:.1f} ms{share}", va="center")
    axis.set(yticks=[], xlabel="ms, with quartiles",
             title=f"The whole step, {rows[0]['task']['elements']:,} elements:\n"
             "unscale, clip, AdamW, average, bfloat16 copy, zero the gradient")  # fmt: skip
    axis.grid(alpha=0.3, axis="x")
    return True


def threads(axis: Any, results: dict[str, Any]) -> bool:
    """Nanoseconds per element over the number of threads."""
    rows = _rows(results, "threads")
    if len(rows) < 2:
        return False
    x = [float(row["task"]["threads"]) for row in rows]
    n = rows[0]["task"]["elements"]
    _curves(axis, rows, x, [1e9 / n] * len(rows))
    axis.set(xlabel="threads", ylabel="ns per element", ylim=(0, None), xticks=x,
             title=f"One AdamW step of {n:,} float32 elements")  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return True
