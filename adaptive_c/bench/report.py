"""Makes tables in Markdown, and pictures, from what the suite measured (the JSON file)."""

from pathlib import Path
from typing import Any

from .._native import counted
from ..figures.palette import BLUE, GREEN, ORANGE, PURPLE, RED, SKY
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


def duration(seconds: float, *beside: float) -> str:
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
    """A peer's cell of a table: its ratio, or why there is none."""
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
                *(f"| {name} | {duration(facts['median'])} |" for name, facts in libraries)]  # fmt: skip
    names.sort(key="ceiling".__eq__)
    heads = ["ceiling: share reached" if name == "ceiling" else name for name in names]
    lines = [f"| {' | '.join(['', OURS, 'ns per element', *heads])} |", f"|---|---|---|{'---|' * len(names)}"]
    for row in rows:
        mine = row["contenders"].get(OURS, {})
        if "median" not in mine:
            lines.append(f"| {row['label']} | {_cell(mine)} |{' |' * (1 + len(names))}")
            continue
        cells = [duration(mine["median"], *mine["quartiles"]), f"{mine['median'] / row['task']['elements'] * 1e9:.3f}"]
        lines.append(
            f"| {row['label']} | {' | '.join([*cells, *(_cell(row['contenders'].get(n, {})) for n in names)])} |"
        )
    return lines


def markdown(results: dict[str, Any]) -> str:
    """All tables of a run, as Markdown."""
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
        lines += [f"| {label} | {duration(measured)} | {duration(predicted)} | {predicted / measured - 1:+.0%} |"
                  for label, measured, predicted in found]  # fmt: skip
    return "\n".join(lines) + "\n"


# --- pictures ----------------------------------------------------------------------------------------------------


def pictures(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write PNG and SVG files of everything for which there are rows; raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    from ..figures.picture import look, png

    paths = []
    with look():
        for draw in (sizes, roofline, whole_step, threads):
            figure = Figure(figsize=(8, 4.8), layout="constrained")
            if draw(figure.subplots(), results):
                for ending in ("png", "svg"):
                    path = folder / f"adaptive-c-bench-{draw.__name__}.{ending}"
                    if ending == "png":
                        png(figure, 120).save(path, optimize=True)
                    else:
                        figure.savefig(path, metadata={"Date": None})
                    paths.append(path)
    return paths


def _rows(results: dict[str, Any], group: str) -> list[dict[str, Any]]:
    """The rows of a group that were measured."""
    return [row for row in results["rows"] if row["group"] == group and "median" in row["contenders"].get(OURS, {})]


def _curves(axis: Any, rows: list[dict[str, Any]], x: list[float], scale: list[float]) -> None:
    """Draw a line for each contender: ours is thick, the ceiling dotted, the others have a colour and a mark."""
    looks = [(colour, mark) for mark in "os^D" for colour in (BLUE, ORANGE, GREEN, RED, SKY, PURPLE)]
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
    for name, (colour, mark) in zip(names, looks, strict=False):
        points = [(x[j], row["contenders"][name]["median"] * scale[j]) for j, row in enumerate(rows)
                  if "median" in row["contenders"].get(name, {})]  # fmt: skip
        style = {"color": "black", "linewidth": 2.5, "zorder": 5} if name == OURS else \
            {"color": "black", "linestyle": ":", "linewidth": 1.5} if name == "ceiling" else \
            {"color": colour, "marker": mark, "markersize": 4, "linewidth": 1}  # fmt: skip
        if points:
            axis.plot(*zip(*points, strict=True), label=name, **style)


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
    axis.grid()
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return True


def roofline(axis: Any, results: dict[str, Any]) -> bool:
    """How near every rule and format comes to its ceiling at the largest size, with the interval of 95%."""
    rows = [row for group in ("rules", "formats", "whole") for row in _rows(results, group)
            if row["task"]["elements"] == results["settings"]["large"]
            and "times_ours" in row["contenders"].get("ceiling", {})]  # fmt: skip
    plain = [row["task"] for row in rows if row["group"] == "rules"]
    rows = [row for row in rows if row["group"] == "rules" or row["task"] not in plain]  # AdamW is in two groups
    if not rows:
        return False
    axis.figure.set_size_inches(8, 1.5 + 0.21 * len(rows))
    looks = {"rules": (BLUE, "o", "a rule in float32"), "formats": (RED, "s", "AdamW with narrow numbers"),
             "whole": (GREEN, "D", "the whole step")}  # fmt: skip
    for y, row in enumerate(rows):
        mine, share, n = row["contenders"][OURS], row["contenders"]["ceiling"]["times_ours"], row["task"]["elements"]
        colour, mark, label = looks[row["group"]]
        axis.plot([share["low"], min(share["high"], 1.3)], [y, y], color=colour, linewidth=1.2)
        axis.plot(share["ratio"], y, mark, color=colour, markersize=6, label=label)
        speed = f"{mine['bytes_per_element'] * n / mine['median'] / 1e9:.0f}"
        for place, text in ((1.36, f"{mine['bytes_per_element']:.0f}"), (1.47, f"{mine['median'] / n * 1e9:.2f}"),
                            (1.57, speed)):  # fmt: skip
            axis.text(place, y, text, ha="right", va="center", fontsize=7.5, color="0.2")
    for place, text in ((1.36, "bytes"), (1.47, "ns"), (1.57, "GB/s")):
        axis.text(place, -0.9, text, ha="right", va="bottom", fontsize=7.5, color="0.35")
    axis.axvline(1, color="black", linestyle=":", linewidth=1.5, label="the ceiling: the same bytes, no arithmetic")
    names = [row["label"].removesuffix(f", {row['task']['elements']:,}") if row["group"] != "whole" else "whole step"
             for row in rows]  # fmt: skip
    axis.set(xlim=(0, 1.6), ylim=(len(rows) - 0.4, -0.6), xlabel="share of the ceiling, with intervals of 95%",
             yticks=range(len(rows)), yticklabels=names, xticks=[i / 5 for i in range(6)])  # fmt: skip
    axis.set_title(f"Steps of {results['settings']['large']:,} elements; bytes and ns are per element", pad=16)
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.grid(axis="x")
    axis.tick_params(axis="y", length=0)
    axis.spines["bottom"].set_bounds(0, 1.3)
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.figure.legend(handles.values(), handles, loc="outside lower center", ncols=2)
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
                  color={"ceiling": "0.8", OURS: SKY}.get(name, ORANGE))  # fmt: skip
        share = "" if (found := ratio(facts.get("times_ours"))) == NOTHING else f", {found}"
        axis.text(0, i, f"  {name}: {middle:.1f} ms{share}", va="center")
    axis.set(yticks=[], xlabel="ms, with quartiles",
             title=f"The whole step, {rows[0]['task']['elements']:,} elements:\n"
             "unscale, clip, AdamW, average, bfloat16 copy, zero the gradient")  # fmt: skip
    axis.grid(axis="x")
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
    axis.grid()
    axis.legend()
    return True
