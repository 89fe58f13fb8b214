"""The process of one contender: builds a subject, checks it against the reference, then times it when asked.

It obeys lines of JSON on standard input and answers each with a line of JSON on standard output.
"""

import gc
import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import reference
from . import rows
from .contenders import CONTENDERS, LR, Array, Contender, Subject, Task

_ENDS, _ARRAYS, _STEPS = 512, 32, rows.CHECKED
_LONG = 0.5  # seconds after which a timing ends early


def sample(arrays: list[Array]) -> Array:
    """The first and last elements of some of the arrays, as float64.  Every rule is elementwise, so this is enough."""
    some = arrays[:: max(1, len(arrays) // _ARRAYS)]
    parts = [part for x in some for part in (x[:_ENDS], x[_ENDS:][-_ENDS:])]
    x = np.concatenate(parts)
    if x.dtype == np.uint16:  # bfloat16
        x = (x.astype("uint32") << np.uint32(16)).view("float32")
    return x.astype("float64")


def expected(contender: Contender, task: Task, p: Array, g: Array, norm: float) -> Array:
    """The sampled parameters after three steps of the reference in float64, the gradient doubling from step to step."""
    ours = contender.name.startswith(("adaptive_c", "torch "))
    rule = getattr(reference, task.rule.lower() if ours else contender.rule)
    options = {**(task.options if ours else contender.options), "lr": LR}
    state: dict[str, Any] = {}
    for t in range(1, _STEPS + 1):
        factor = min(1 / 1024, 1 / (norm * 2 ** (t - 1))) if task.whole else 1.0
        p = np.asarray(rule(p, factor * 2 ** (t - 1) * g, state, t, **options))
    return p


def difference(contender: Contender, task: Task, before: Array, after: Array, wanted: Array) -> str:
    """What is wrong with the parameters after three steps; an empty string if nothing is.

    Exact numbers are the business of the tests; this check keeps wrong or idle contenders out of the figures.  The
    error of an update may be a share of the update, 1e-4 if the state is as wide as the parameters (1e-9 in float64),
    5% with bfloat16 and 30% with 8-bit state, plus four roundings of the parameter (in bfloat16 these hide the update).
    """
    unit = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7}[task.dtype]
    narrow = {"uint8": 0.3, "bfloat16": 0.05, None: 0.3 if contender.bits == 8 else 0.0}[task.state_dtype]
    part = narrow or (1e-9 if task.dtype == "float64" else 1e-4)
    size = np.maximum(np.abs(before), np.abs(wanted))
    wrong = ~(np.abs(after - wanted) <= part * np.abs(wanted - before) + 4 * unit * size)
    if wrong.any():
        i = np.unravel_index(np.argmax(wrong), wrong.shape)
        return f"after {_STEPS} steps a parameter is {after[i]:.9g}, where the reference has {wanted[i]:.9g}"
    return ""


def told(file: str, word: str) -> str:
    """What a file of /proc says after a word; nothing where there is no such file or line."""
    with suppress(OSError):
        for line in Path("/proc", file).read_text().splitlines():
            if line.startswith(word):
                return line.partition(":")[2].strip()
    return ""


def told_bytes(file: str, word: str) -> int:
    """The same as a number of bytes, 0 where nothing is said."""
    return 1024 * int((told(file, word) or "0").split()[0])


def build(name: str, task: Task) -> tuple[Subject, dict[str, Any]]:
    """Make a contender for a task and check its results; return it with what is known about it."""
    contender = CONTENDERS[name]
    if name != "adaptive_c":  # the state of a peer is its own choice; the task's state_dtype is ours
        task = replace(task, dtype=contender.dtype or task.dtype, state_dtype=None,
                       spread=contender.spread or task.spread)  # fmt: skip
    make = rows.ours if task.rows and name == "adaptive_c" else contender.build
    small = make(replace(task, sizes=(8192,), rows=min(task.rows, 32)))
    timed(small, "step", 1)  # imports, compiles and starts threads
    del small
    if task.rows:
        touched, before, wanted = rows.expected(contender, task)
    else:
        params, grads = task.arrays()
        before, g, norm = sample(params), sample(grads), 0.0
        if task.whole:
            norm = float(np.sqrt(sum(float(np.sum(np.square(x, dtype="float64"))) for x in grads)))
        del params, grads
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the high-water mark
    start = told_bytes("self/status", "VmRSS")
    subject = make(task)
    for i in range(_STEPS):
        if i:
            subject.double()
        timed(subject, "step", 1)
    peak = told_bytes("self/status", "VmHWM") - start
    if task.rows:
        after = subject.params()[0][touched].astype("float64")
    else:
        after, wanted = sample(subject.params()), expected(contender, task, before, g, norm)
    if task.uneven:  # far below the largest of a block 8 bits hold a moment in the mean only
        clear = (np.abs(g) > 2.0**-12) | (g == 0)
        before, after, wanted = before[clear], after[clear], wanted[clear]
    found = difference(contender, task, before, after, wanted)
    seconds = timed(subject, "step", 1)
    return subject, {
        "wrong": found,
        "seconds": seconds,
        "bytes": subject.bytes,
        "peak": peak,
        "steps": ["step", *(["ceiling"] if subject.ceiling else [])],
    }


def timed(subject: Subject, what: str, repeat: int) -> float:
    """Seconds of one step: the mean over `repeat` steps, or over fewer if the machine has become much slower."""
    step = subject.step if what == "step" else subject.ceiling
    assert step is not None
    prepare = subject.prepare if what == "step" else None
    seconds, done, clock = 0.0, 0, time.perf_counter
    batch = 1 if prepare else max(1, repeat // 10)
    while done < repeat and seconds < _LONG:
        if prepare:
            prepare()
        start = clock()
        for _ in range(batch):
            step()
        seconds += clock() - start
        done += batch
    return seconds / done


def main() -> None:
    """Answer orders, one line of JSON each, until standard input ends."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error, not between the answers
    subject: Subject | None = None
    for line in sys.stdin:
        order = json.loads(line)
        result: Any
        if "build" in order:
            try:
                subject, result = build(order["build"], Task(**order["task"]))
            except ImportError as error:
                result = {"missing": str(error).splitlines()[0] if str(error) else type(error).__name__}
            except Exception as error:
                result = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        elif "drop" in order:
            subject = result = None
            gc.collect()
        else:
            assert subject is not None
            gc.disable()
            if order["repeat"] > 1:  # for a long step, waking the threads makes no difference
                timed(subject, order["time"], 1)  # wakes the threads
            result = timed(subject, order["time"], order["repeat"])
            gc.enable()
        print(json.dumps(result), file=answer, flush=True)


if __name__ == "__main__":
    main()
