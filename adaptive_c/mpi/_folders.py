"""The folders of the ranks' state: which one is whose, and which of their records make one step.

The ranks write their records when all have written their buckets.  If they are killed meanwhile, some are one record
ahead of the others.  So each keeps the one before, too, whose buckets are not written to until all have the next one.
"""

import os
import re
from typing import Any

from .._disk.folder import RECORDS, check_names, made

NONE = -1  # the number of a record that there is not
_NAME = re.compile(r"(\d+)-of-(\d+)")


def folder(path: Any, rank: int, size: int) -> str:
    """A rank's own, in the one that all have or, on disks of their own, one each.  It is not made here."""
    found = made(path)
    check_names(found, _NAME.fullmatch)
    for name in os.listdir(found):
        of = _NAME.fullmatch(name)
        if of and int(of[2]) != size and any(os.path.exists(os.path.join(found, name, x)) for x in RECORDS):
            raise ValueError(f"state_path: {found} has the state of {of[2]} ranks, and these are {size}: start "
                             f"{of[2]}; to go on with {size}, save(path) on {of[2]}, and load(path) with a new "
                             "state_path")  # fmt: skip
    return os.path.join(found, f"{rank}-of-{size}")


def common(every: list[list[int]], new: int) -> tuple[int, int]:
    """The number of the record that all ranks go on from, and the run that it is of; NONE, and a new one, to begin.

    every: of each rank the numbers of its last record and of the one before, and the run that they are of.
    """
    lasts = [last for last, _, _ in every]
    number, newest = min(lasts), max(lasts)
    if number == NONE and newest <= 0:
        return NONE, new  # nothing, or not on all ranks: as if none had begun
    slow, fast = lasts.index(number), lasts.index(newest)
    stranger = next((rank for rank, (_, _, run) in enumerate(every) if run != every[0][2]), None)
    if number == NONE:
        what = f"rank {slow} has no state in its folder, and rank {fast} has"
    elif stranger is not None:
        what = f"the folder of rank {stranger} is of another run than that of rank 0"
    elif not all(number in (last, before) for last, before, _ in every):
        what = (f"the folder of rank {slow} is {newest - number} records behind that of rank {fast}, and ranks can go "
                "back by one only")  # fmt: skip
    else:
        return number, every[0][2]
    raise ValueError(f"{what}; give each rank its own folder again, or load a checkpoint with a new state_path")
