"""All that a group holds, flat, in the order of its parameter space, by name."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Never

import numpy as np

from .layout import Array, Layout
from .rule import Rule

if TYPE_CHECKING:
    from .run import Run

BLOCK = 256  # elements of 8-bit state that share a scale
CHUNK = 4096  # elements: the unit of the cut into shares


def zeros(n: int, dtype: Any, turn: int = 0) -> Array:
    """A flat array of zeros.  That of a large one starts on a cache line, and its pages are not yet touched.

    turn: the arrays of a group that are swept together start at different places of a page (large parameters and
    gradients start at its beginning).  Without that, a load from one array waits for a recent store to another whose
    address has the same low 12 bits (4K aliasing): 1.7 times as long for a step of 2**17 elements.
    """
    nbytes = n * np.dtype(dtype).itemsize
    if nbytes < 4096:  # in the first-level cache, it makes no difference
        return np.zeros(n, dtype)
    raw = np.zeros(nbytes + 4096, np.uint8)
    start = (704 * turn - raw.ctypes.data) % 4096
    return raw[start : start + nbytes].view(dtype)


Allocate = Callable[[int, Any, int], Array]


class Store:
    """The arrays of a group by name: its state and their scales, master copy, average and, once wanted, sums.

    arrays: one number, or one scale, for each element or block from number `start` of the group's parameter space on,
    or for each row from number `first_row` on; other processes may have the rest.  counts: one number for each array of
    the parameters.
    """

    def __init__(
        self,
        layout: Layout,
        rule: Rule,
        options: Mapping[str, Any],
        computed: str,
        allocate: Allocate,
        held: tuple[int, int],
    ) -> None:
        """held: the range of elements, from the start of a block on."""
        self.start, n = held[0], held[1] - held[0]
        slots = rule.state
        self.slots, self.computed, self.size, self._total = slots, computed, n, sum(layout.sizes)
        self.kind = options["state_dtype"] if options["state_dtype"] in ("bfloat16", "uint8") else "native"
        by_row = options.get("second_moment") == "row"
        self.by_row = {name for name, slot in slots.items() if slot.moment and by_row}  # one number for each row
        self.first_row, self.n_rows, self._rows = 0, 0, sum(layout.rows) if by_row else 0
        if by_row:  # rows that begin here, and so end here; the first of a group also those that have no elements
            self.first_row = layout.rows_before(held[0]) if held[0] or (n == 0 < self._total) else 0
            self.n_rows = layout.rows_before(held[1]) - self.first_row
        self.arrays: dict[str, Any] = {}  # one that is not in memory has a size, a dtype and `read`
        for turn, (name, slot) in enumerate(slots.items(), 1):
            if name in self.by_row and slot.needed(options):
                self.arrays[name] = zeros(self.n_rows, computed, turn)
                self.arrays[name][:] = options[slot.start] if slot.start else 0.0
            elif slot.needed(options):
                dtype = {"native": computed, "bfloat16": "uint16", "uint8": "uint8"}[self.kind]
                self.arrays[name] = allocate(n, "int8" if slot.coding == "sign" else dtype, turn)
                if self.kind == "uint8":
                    self.arrays[f"{name}_scale"] = allocate(-(-n // BLOCK), "float32", 0)
        if options["master"]:
            self.arrays["master"] = allocate(n, "float32", 4)
        if options["ema_decay"] is not None:
            self.arrays["ema"] = allocate(n, computed, 5)
        m = len(layout.arrays)
        self.starts = {name: float(options[slot.start]) if slot.start else 0.0 for name, slot in slots.items()}
        self.counts = {"step": np.zeros(m, "int64"), **{name: np.full(m, x) for name, x in rule.per_array.items()},
                       "started": np.zeros(m, "uint8"), "summed": np.zeros(m, "uint8")}  # fmt: skip

    def add_sums(self) -> Array:
        """Allocate the sums of gradients, which are wanted from now on.

        They reach into the next share: where each array is clipped by itself, the last chunk that begins here does.
        """
        n = min(self.size + CHUNK, self._total - self.start) if self.size else 0
        self.arrays["sums"] = found = zeros(n, self.computed)
        return found

    def array(self, name: str) -> Array:
        """An array by name; a copy that can't be written, if it is not in memory."""
        found: Array = self.arrays[name] if isinstance(self.arrays[name], np.ndarray) else self.arrays[name].read()
        return found

    @property
    def state(self) -> list[str]:
        """The names of the state arrays that there are, in the order of the rule's slots."""
        return [name for name in self.slots if name in self.arrays]

    def kind_of(self, name: str) -> str:
        """What the elements of an array are: the name of their dtype, or "bfloat16"."""
        if name in self.slots and name not in self.by_row:
            return (
                "int8" if self.slots[name].coding == "sign" else self.computed if self.kind == "native" else self.kind
            )
        return self.computed if name in ("ema", "sums") or name in self.by_row else "float32"

    def place(self, name: str) -> tuple[int, int]:
        """(place of this process's first number of an array, how many numbers all processes have)."""
        if name in self.by_row:
            return self.first_row, self._rows
        per = BLOCK if name.endswith("_scale") else 1
        return self.start // per, -(-self._total // per)

    def decoded(self, name: str, bound: Any) -> Array:
        """A copy of a state array as the rule computes, widened from whatever it is stored in."""
        stored = self.array(name)
        if self.kind == "native" or name in self.by_row:
            return stored.astype(self.computed)
        flat = np.empty(stored.size, "float32")
        bound.decode(
            list(self.slots).index(name), flat, stored, self.array(f"{name}_scale") if self.kind == "uint8" else None
        )
        return flat


class State(Mapping[str, Any]):
    """The live state by name, each in the structure of the parameters: views, made when asked for.

    The scales of 8-bit state, one for each block of 256 elements, are one flat array for a group.
    """

    def __init__(self, run: "Run") -> None:
        self._run = run

    def __getitem__(self, name: str) -> Any:
        run = self._run
        if run.on_disk:
            with run.looking():
                found = self._find(name)
        elif run.plan.structured or not isinstance(name, str):
            found = self._find(name)
        else:  # at once, since this is looked up often
            found = run.groups[0].find(name)
        if found is None:
            raise KeyError(f"{name!r} is no state of this optimizer; it has {', '.join(self) or 'none'}")
        return found

    def _find(self, name: str) -> Any:
        """The state of this name in the structure of the parameters; None if there is none."""
        groups, structured = self._run.groups, self._run.plan.structured
        if not isinstance(name, str):
            return None
        if not structured:
            return groups[0].find(name)
        found = [group.find(name) for group in groups]
        return None if all(x is None for x in found) else found

    def __getattr__(self, name: str) -> Never:
        hint = f" (did you mean opt.state[{name!r}]?)" if "_run" in vars(self) and name in self else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    def __iter__(self) -> Iterator[str]:
        stores = [group.store for group in self._run.groups]
        names = [x for name in stores[0].slots for x in (name, f"{name}_scale")] + ["master"]
        yield from (name for name in names if any(name in store.arrays for store in stores))
        yield from (name for name in stores[0].counts if name not in ("started", "summed"))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __reduce_ex__(self, protocol: Any) -> Never:
        raise TypeError("opt.state can't be pickled or copied: it belongs to its optimizer; opt.state_dict() has its "
                        "arrays, and the optimizer itself can be pickled and deep-copied")  # fmt: skip

    def __repr__(self) -> str:
        return f"<state: {', '.join(self)}>"
