"""Make a run of the suite the recorded one, and write its figures into the pages that quote them.

    adaptive-c bench --config benchmarks/recorded.toml --out FOLDER
    python -P benchmarks/record.py FOLDER   # without FOLDER, the pages are written again from the run that is recorded

A page says which figure it quotes by a comment before it, and where the quotation ends:

    <!-- recorded longer; lists; 10,000 arrays of 1,000; torch fused -->13 times as long [13, 15]<!-- end -->

The first word is one of QUOTES, and the rest are its arguments.  tests/test_record.py fails if a page says something
else than the record.
"""

import argparse
import json
import re
from pathlib import Path

from adaptive_c import optimizers
from adaptive_c._native import counted
from adaptive_c.bench import model, report

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/performance.md", "docs/whole_step.md", "docs/narrow_numbers.md")
COPIED = {"json": "benchmarks/recorded.json", "md": "benchmarks/recorded.md", "sizes.png": "docs/performance-sizes.png",
          "roofline.png": "docs/performance-roofline.png"}  # fmt: skip
QUOTED = re.compile(r"(<!-- recorded ([^>]*?) -->).*?(<!-- end -->)", re.S)
OURS, MISSING = report.OURS, "(not in the recorded run)"
# The README's rows: a label there, a group and a label of the suite.
HONEST = [
    *((f"{n:,}", "sizes", f"{n:,}") for n in (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 24, 1 << 26)),
    ("10,000 arrays of 1,000", "lists", "10,000 arrays of 1,000"),
    ("GPT-2 124M, 148 arrays", "lists", "GPT-2 124M, 148 arrays"),
    ("whole step, 67,108,864", "whole", "67,108,864"),
    *((f"uint8 state, {n:,}", "formats", f"float32 parameters, uint8 state, {n:,}") for n in (1 << 24, 1 << 26)),
    ("8,192 rows of 2,000,000", "rows", "AdamW, 8,192 of 2,000,000 rows"),
]
PYTORCH = {"whole": "torch, call by call", "rows": "torch SparseAdam"}  # what PyTorch is in a group; else "torch fused"


class Record:
    """The results of a run, and a method for each kind of quotation."""

    def __init__(self, results):
        self.results = results
        self.rows = {(row["group"], row["label"]): row for row in results["rows"]}

    def facts(self, group, label, name):
        return self.rows.get((group, label), {}).get("contenders", {}).get(name, {})

    def compared(self, group, label, name):
        """How long a contender takes as a multiple of our time, with the interval, or None."""
        return self.facts(group, label, name).get("times_ours")

    def per_element(self, group, label):
        """Our nanoseconds for an element."""
        row = self.rows[group, label]
        return 1e9 * row["contenders"][OURS]["median"] / row["task"]["elements"]

    # --- single figures, within a sentence -----------------------------------------------------------------------

    def ratio(self, group, label, name):
        x = self.compared(group, label, name)
        return MISSING if x is None else _bracketed(x)

    def longer(self, group, label, name):
        return self._sentence(group, label, name, "long")

    def faster(self, group, label, name):
        return self._sentence(group, label, name, "fast")

    def _sentence(self, group, label, name, what):
        x = self.compared(group, label, name)
        if x is None:
            return MISSING
        if x["low"] <= 1 <= x["high"]:
            return f"as {what}, within the noise [{x['low']:.2f}, {x['high']:.2f}]"
        number, brackets = _bracketed(x).split(" ", 1)
        return f"{number} times as {what} {brackets}"

    def between(self, group, name, *labels):
        """The smallest and the largest ratio of some rows."""
        found = [x["ratio"] for label in labels if (x := self.compared(group, label, name))]
        return f"{min(found):.2f} to {max(found):.2f}" if found else MISSING

    def ns(self, group, label):
        return f"{self.per_element(group, label):.2f} ns" if (group, label) in self.rows else MISSING

    # --- paragraphs and tables -----------------------------------------------------------------------------------

    def machine(self):
        env = self.results["environment"]
        compiler, *_, version = env["compiler"].split()
        parts = (
            env["processor"],
            counted(env["processors"], "processor"),
            counted(env["threads"], "thread"),
            f"the {env['instruction_set']} build by {compiler} {version}",
            f"Python {env['python']}",
            f"{self.results['settings']['rounds']} rounds",
        )
        return ", ".join(parts)

    def table(self, group):
        """The table of a group as the suite's own report has it."""
        rows = [row for row in self.results["rows"] if row["group"] == group]
        none = f"The recorded run has no such rows yet. `adaptive-c bench {group}` measures them."
        text = "\n".join(report.table(rows)) if rows else none
        return f"\n\n{text}\n\n"

    def honest(self):
        """The README's table."""
        versions = self.results["environment"]["versions"]
        torch, deepspeed = (versions.get(name, "").partition("+")[0] for name in ("torch", "deepspeed"))
        lines = []
        for title, group, label in HONEST:
            if mine := self.facts(group, label, OURS):
                peers = [self.compared(group, label, name) for name in (PYTORCH.get(group, "torch fused"),
                                                                        "DeepSpeed CPUAdam")]  # fmt: skip
                cells = [report.duration(mine["median"]), *(x and report.ratio(x) for x in peers)]
                share = self.compared(group, label, "ceiling")
                cells.append(share and f"{share['ratio']:.2f}")
                lines.append([title, *(cell or "" for cell in cells)])
        heads = (
            "elements",
            "our step",
            f"PyTorch {torch}, fused",
            f"DeepSpeed {deepspeed}, CPUAdam",
            "share of the ceiling",
        )
        return _table(heads, lines)

    def rules(self):
        """Every rule's time and its share of the ceiling, and which rules are newer than the run."""
        lines = []
        found = [label for group, label in self.rows if group == "rules"]
        for label in found:
            share = self.compared("rules", label, "ceiling")
            large, cached = (f"{self.per_element(group, label):.3f}" for group in ("rules", "in cache"))
            lines.append([label, large, _bracketed(share) if share else "", cached])
        heads = (
            "rule, 2^26 float32 elements",
            "ns per element",
            "share of the ceiling",
            "in cache, one core: ns per element",
        )
        newer = " and ".join(rule for rule in optimizers.__all__ if rule not in found)
        return _table(heads, lines) + (f"Newer than the recorded run: {newer}.\n\n" if newer else "")

    def narrow(self):
        """AdamW with narrow numbers, and how much longer others take."""
        lines = []
        for group, label in self.rows:
            if group != "formats" or "float32 state" in label or "uneven" in label:
                continue
            narrow = label.startswith("bfloat16")
            names = ["torch fused float32", "torch fused"] if narrow else ["torch fused", ""]
            cells = [report.ratio(x) if (x := self.compared(group, label, name)) else "" for name in names]
            eights = [self.compared(group, label, f"{name} AdamW8bit") for name in ("bitsandbytes", "torchao")]
            cells.append(", ".join(report.ratio(x) for x in eights if x))
            lines.append([label, f"{self.per_element(group, label):.2f}", *cells])
        heads = ("parameters, state and elements", "ns per element", "torch's fused AdamW, float32",
                 "the same in bfloat16", "bitsandbytes, torchao with 8 bits")  # fmt: skip
        return _table(heads, lines)

    def model(self):
        """How well the model predicts the run."""
        found = [(label.partition(": ")[2], predicted / measured - 1)
                 for label, measured, predicted in model.predictions(self.results)]  # fmt: skip
        if not found:
            return "the recorded run none is large enough."
        (low, least), (high, most) = (pick(found, key=lambda x: x[1]) for pick in (min, max))
        rates = [mine["bytes_per_element"] * row["task"]["elements"] / row["contenders"]["ceiling"]["median"] / 1e9
                 for row in self.results["rows"] if row["group"] == "rules" and "ceiling" in row["contenders"]
                 for mine in [row["contenders"][OURS]]]  # fmt: skip
        errors = f"{least:+.0%} ({low}) to {most:+.0%} ({high})"
        bandwidth = f"{min(rates):.0f} to {max(rates):.0f} GB/s"
        return (
            f"the recorded run it predicts {len(found)} rows, with errors from {errors}. The bandwidth was {bandwidth}."
        )


def _bracketed(x):
    """A ratio with its interval, with as many digits as a reader needs."""
    digits = 2 if x["ratio"] < 10 else 0
    return f"{x['ratio']:.{digits}f} [{x['low']:.{digits}f}, {x['high']:.{digits}f}]"


def _table(heads, rows):
    """A table in Markdown, with empty lines around it."""
    lines = (f"| {' | '.join(cells)} |" for cells in (heads, *rows))
    return "\n\n" + "\n".join([next(lines), "|---" * len(heads) + "|", *lines]) + "\n\n"


QUOTES = ("ratio", "longer", "faster", "between", "ns",
          "machine", "table", "honest", "rules", "narrow", "model")  # fmt: skip


def quoted(text, results):
    """The text of a page with the figures of these results."""
    record = Record(results)

    def figure(match):
        name, *arguments = match[2].split("; ")
        if name not in QUOTES:
            raise ValueError(f"there is no quotation {name!r}; there are {', '.join(QUOTES)}")
        return match[1] + getattr(record, name)(*arguments) + match[3]

    return QUOTED.sub(figure, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where `adaptive-c bench --out` has written a run")
    folder = parser.parse_args().folder
    files = {}
    if folder:
        for ending, place in COPIED.items():
            dash = "." if "." not in ending else "-"
            files[place] = (folder / f"adaptive-c-bench{dash}{ending}").read_bytes()
    results = json.loads(files.get(COPIED["json"]) or (ROOT / COPIED["json"]).read_bytes())
    texts = {page: quoted((ROOT / page).read_text(), results) for page in PAGES}
    for place, contents in files.items():  # all of them or none
        (ROOT / place).write_bytes(contents)
    for page, text in texts.items():
        (ROOT / page).write_text(text)


if __name__ == "__main__":
    main()
