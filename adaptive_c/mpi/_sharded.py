"""An optimizer whose state is shared out among the ranks of an MPI communicator."""

import inspect
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Never

import numpy as np
from mpi4py import MPI

from .. import __version__
from .._checkpoint import description
from .._native import processors
from .._optimizer import Optimizer
from .._run.options import Choice, moves
from .._run.run import Run
from ..typing import Params
from . import _checkpoint
from ._agreement import agree, difference, hashed, texts
from ._exchange import Exchange

_BUCKET, _MESSAGE = 32 << 20, 256 << 10  # bytes: a bucket, but for many ranks at least so much from each


class _DocOfOptimizer:
    """The docstring of the optimizer's attribute of the same name."""

    def __get__(self, passed: Any, kind_of_attribute: object) -> str | None:
        return None if passed is None else inspect.getattr_static(Optimizer, passed._name).__doc__


class _Passed:
    # An attribute of the optimizer that is shared out.

    __doc__ = _DocOfOptimizer()

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, sharded: Any, owner: type) -> Any:
        return self if sharded is None else getattr(sharded._opt, self._name)

    def __set__(self, sharded: Any, value: Any) -> None:
        setattr(sharded._opt, self._name, value)


class Sharded:
    """An optimizer whose state is shared out among the ranks of an MPI communicator.

    Every rank has all parameters, and the state of its share: n/ranks elements, cut at multiples of 4,096.  A step adds
    up the gradients of all ranks; each rank steps its share, and gives it to the others.  Parameters, state and counts
    have the bits of one process that calls `accumulate` with the gradients of rank 0, 1, 2 ... and then `step`, for any
    number of ranks, bucket size and threads.

    All ranks call the constructor and each method marked "collective" in the same order.  What one of them refuses,
    all raise, with the same type and message and a note that names the rank; then nothing has changed anywhere.

    Parameters
    ----------
    optimizer : class of an optimizer
        Such as ``adaptive_c.AdamW``.
    params : array, list or tuple of arrays, dict of arrays, or list of group dicts
        As for the optimizer.  The same on all ranks: structure, shapes, dtypes and values, which is checked.
    comm : mpi4py.MPI.Comm, optional
        The ranks; MPI.COMM_WORLD otherwise.  It is duplicated, so that messages of yours are not mixed up with these.
    reduction : {"mean", "sum"}, default "mean"
        What a step uses of the ranks' gradients: their sum, divided by the number of calls (ranks times calls of
        `accumulate`), or not.
    bucket_bytes : int, optional
        How many bytes a rank receives at a time, about; None is 32 MiB, or 256 KiB from each other rank if that is
        more.  There are two such buffers to receive into and, where arrays are many or small, two to send from.
    **options
        Options of the optimizer, the same on all ranks, which is checked; but n_threads may differ.  Where neither it
        nor OMP_NUM_THREADS is given, ranks that may use the same processors share them out.  keep_undo and state_path
        are refused.

    Attributes
    ----------
    comm : mpi4py.MPI.Comm
        The duplicate.
    shares : list of (int, int)
        For each group the elements of its parameter space (its arrays, one after the other) whose state this rank has.
    state : dict
        By name the live state of this rank's share, flat; for a list of groups, a list with one array for each, or
        None.  ``"ema"`` and ``"master"`` are among it.
    t, param_groups, grad_norm, skipped_steps, pending, n_threads
        As of the optimizer.
    max_grad_norm, norm_over, max_grad_value, on_nonfinite, loss_scale, zero_grad, flush_denormals, seed
        As of the optimizer.  What is assigned must be assigned on all ranks; the next step checks that.
    nbytes : int
        Bytes of state on this rank, as of the optimizer; the buffers for messages excluded.

    Raises
    ------
    TypeError, ValueError
        As the optimizer's class does; if the ranks give different parameters or options, with the first difference.
    RuntimeError
        From every method, once a call on this rank ended in the middle: by a Ctrl-C or a failure of MPI.

    Notes
    -----
    Differs from: torch's ZeroRedundancyOptimizer, which gives whole arrays to ranks, and whose sum depends on the
    number of ranks.

    Examples
    --------
    A script, which ``mpiexec -n 4 python script.py`` runs on four ranks:

    >>> import numpy as np
    >>> from adaptive_c import AdamW
    >>> from adaptive_c.mpi import Sharded
    >>> w = np.ones(10_000)
    >>> opt = Sharded(AdamW, w, lr=0.1, weight_decay=0.0)
    >>> opt.step(np.full(10_000, 1.0 + opt.comm.rank))  # each rank has gradients of its own
    >>> w[:3].round(6)
    array([0.9, 0.9, 0.9])
    """

    t = _Passed()
    param_groups = _Passed()
    grad_norm = _Passed()
    skipped_steps = _Passed()
    pending = _Passed()
    nbytes = _Passed()
    n_threads = _Passed()
    max_grad_norm = _Passed()
    norm_over = _Passed()
    max_grad_value = _Passed()
    on_nonfinite = _Passed()
    loss_scale = _Passed()
    zero_grad = _Passed()
    flush_denormals = _Passed()
    seed = _Passed()

    def __init__(
        self,
        optimizer: type[Optimizer],
        params: Params,
        *,
        comm: Any = None,
        reduction: Literal["mean", "sum"] = "mean",
        bucket_bytes: int | None = None,
        **options: Any,
    ) -> None:
        self.comm = comm = (MPI.COMM_WORLD if comm is None else comm).Dup()
        self._torn = ""  # what ended a call in the middle
        self._known: Any = None  # places and formats of the last gradients, and how they are exchanged
        error, lines = None, []
        try:
            self._mean = Choice("mean", "sum")("reduction", reduction) == "mean"
            if bucket_bytes is None:
                bucket_bytes = max(_BUCKET, _MESSAGE * (comm.size - 1))
            elif isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int) or bucket_bytes < 1:
                raise ValueError(f"bucket_bytes must be an integer from 1 on, got {bucket_bytes!r}")
            if options.get("state_path") is not None:
                raise ValueError("state_path is refused: a step of several ranks is not one of all their folders; drop "
                                 "it, or use state_dtype='uint8'")  # fmt: skip
            self._opt = _part_of(optimizer, comm)(params, **options)
            self._run = self._opt._run
            if self._run.plan.keeps_undo:
                raise ValueError("keep_undo=True is refused: a step of several ranks can't be rolled back; drop it")
            if any(group.store.by_row for group in self._run.groups):
                raise ValueError("second_moment='row' is refused: numbers of rows are not shared out; drop it, or use "
                                 "state_dtype='uint8'")  # fmt: skip
            with self._run.guard:
                lines = _lines("", description._describe(self._run))
            lines += [f"the version of adaptive_c {__version__}", f"reduction={reduction!r}", f"{bucket_bytes=}"]
            lines += [f"values of group {i} with the checksum {crc:08x}" for i, crc in enumerate(_crcs(self._run))]
        except Exception as e:
            error = e
        refusal, (alike,) = agree(comm, "called the constructor", error, hashed("\n".join(lines).encode()))
        if refusal is None and not alike:
            refusal = ValueError(f"all ranks must construct the same optimizer, but {difference(comm, lines)}")
        if refusal is not None:
            comm.Free()
            raise refusal
        assert bucket_bytes is not None
        self._exchange = Exchange(self._run, comm, bucket_bytes)
        self._run.plan.combine = self._combine
        if self._opt.n_threads is None and "OMP_NUM_THREADS" not in os.environ:
            self._opt.n_threads = _threads(comm)
        if any(group.options["copy_to"] is not None for group in self._run.groups):
            self._exchange.step(None)  # of its share each rank has written the copies

    # --- steps -------------------------------------------------------------------------------------------------------

    def step(
        self,
        grads: Any = ...,
        metric: float | None = None,
        *,
        loss_scale: float | None = None,
        lr: float | Sequence[float | None] | None = None,
    ) -> None:
        """Add up the gradients of all ranks, and update the parameters in place, on all ranks.  Collective.

        Parameters
        ----------
        grads : the structure of params, optional
            This rank's gradients, as for the optimizer's `step`.  Ranks may leave out (None) different arrays, which
            then add nothing, and give different formats.  Gradients of `Rows`, and those with strides, are refused.
            Without grads: what was accumulated.
        metric : float, optional
            As for the optimizer, and the same on all ranks.
        loss_scale : float, optional
            As for the optimizer, and the same on all ranks.
        lr : float or list of float, optional
            As for the optimizer, and the same on all ranks.

        Raises
        ------
        TypeError, ValueError
            As the optimizer's `step` does, on all ranks; if the ranks have made different calls, or have different
            options; with sum_to_one, if the shares cut a row.  Nothing has changed then.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import SGD
        >>> from adaptive_c.mpi import Sharded
        >>> w = np.ones(3)
        >>> opt = Sharded(SGD, w, lr=0.5)
        >>> opt.step(np.ones(3))
        >>> w
        array([0.5, 0.5, 0.5])
        """
        error = self._call(grads, lambda: self._opt._for_one_step(metric, loss_scale, lr))
        if error is not None:
            raise error

    def accumulate(self, grads: Any) -> None:
        """Add the gradients of all ranks to the sums, of which each rank has its share.  Collective.

        It exchanges as many bytes as the first half of a step.  ``step()`` uses the sums; their mean is that over all
        calls on all ranks.  To exchange them once for several micro-batches, add these up yourself; then the bits are
        others than those of one process.

        Parameters
        ----------
        grads : the structure of params
            As for `step`.

        Raises
        ------
        TypeError, ValueError
            As from `step`.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import SGD
        >>> from adaptive_c.mpi import Sharded
        >>> w = np.zeros(3)
        >>> opt = Sharded(SGD, w, lr=1.0)
        >>> opt.accumulate(np.full(3, 1.0))
        >>> opt.accumulate(np.full(3, 3.0))
        >>> opt.step()
        >>> w
        array([-2., -2., -2.])
        """
        error = self._call(grads, None)
        if error is not None:
            raise error

    def discard(self) -> None:
        """Drop what was accumulated, if anything was.  To be called on all ranks, but not collective.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import SGD
        >>> from adaptive_c.mpi import Sharded
        >>> opt = Sharded(SGD, np.zeros(3))
        >>> opt.accumulate(np.ones(3))
        >>> opt.discard()
        >>> opt.pending
        0
        """
        self._opt.discard()

    def _call(self, grads: Any, for_one_step: Callable[[], Any] | None) -> Exception | None:
        """Add gradients to the sums and, if asked for, step; what all ranks refuse it with."""
        plan, given, steps = self._run.plan, grads is not ..., for_one_step is not None
        name = f"called {'step' if steps else 'accumulate'} {'with' if given else 'without'} gradients"
        now, error, same = None, None, b""
        places: list[tuple[int, int]] = []
        with self._collective():
            try:
                one_step = () if for_one_step is None else for_one_step()
                call = plan.sharing(grads, steps, *one_step)
                call.__enter__()
                now = call
                places = now.gradients() if given else []
                numbers, limit = now.options()
                same = repr((one_step[::2], limit, *self._counted())).encode() + numbers
            except Exception as e:
                error = e
            try:
                kinds = np.array([kind for _, kind in places], "int8")
                refusal, (alike, uniform) = agree(self.comm, name, error, hashed(same), hashed(kinds.tobytes()))
                if refusal is not None or now is None:
                    return refusal
                if not alike:
                    return self._differing(one_step)
                if given:
                    self._sum(now, places, self._kinds(kinds, uniform))
                if steps:
                    refusal = self._step(now)
                    if refusal is not None and given:
                        now.drop()
                if refusal is None:
                    now.zero()
                return refusal
            finally:
                if now is not None:
                    now.__exit__()

    @contextmanager
    def _collective(self) -> Iterator[None]:
        """Around what ranks do together: what ends in the middle is of no more use to any."""
        if self._torn:
            raise RuntimeError(
                f"an earlier call ended in the middle on this rank ({self._torn}), and its state may be that of no "
                "step: end all ranks, and resume from a checkpoint"
            )
        try:
            yield
        except BaseException as error:
            self._torn = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise

    def _counted(self) -> tuple[Any, ...]:
        plan = self._run.plan
        settings = {name: None if moves(x) else x for name, x in plan.settings.items()}
        return plan.t, plan.pending, plan.skipped_steps, plan.loss_scale, plan.growth_tracker, settings

    def _differing(self, one_step: Any) -> Exception:
        """Say what differs between the ranks, where something does."""
        names = "t", "pending", "skipped_steps", "loss_scale", "growth_tracker"
        lines = [f"loss_scale and metric {one_step[::2]}", f"lr of this step {one_step[3:]!r}"]
        *counts, settings = self._counted()
        lines += [f"{name}={x!r}" for name, x in zip(names, counts, strict=True)]
        lines += [f"{name}={getattr(self._opt, name)!r}" for name in settings]
        for i, group in enumerate(self._run.groups):
            shown = [name for name in group.options if name not in ("bounds", "copy_to")]
            lines += [f"param_groups[{i}][{name!r}]={group[name]!r}" for name in shown]
        return ValueError(f"the ranks do not go together: {difference(self.comm, lines)}; nothing was changed")

    def _kinds(self, own: Any, uniform: bool) -> list[list[int]]:
        """Of every rank, the formats of its gradients."""
        if uniform:
            return [own.tolist()] * self.comm.size
        found = np.empty((self.comm.size, own.size), "int8")
        self.comm.Allgather(own, found)
        every: list[list[int]] = found.tolist()
        return every

    def _sum(self, now: Any, places: list[tuple[int, int]], kinds: list[list[int]]) -> None:
        """Exchange the gradients, and add them to the sums."""
        plan = self._run.plan
        before = [plan.pending > 0 and bool(x) for group in self._run.groups for x in group.store.counts["summed"]]
        key = places, kinds, before
        if self._known is None or self._known[0] != key:
            self._known = key, self._exchange.gradients(places, kinds, before)
        self._exchange.sum(now, self._known[1])
        after = [old or any(kind[k] >= 0 for kind in kinds) for k, old in enumerate(before)]
        now.summed(after, self.comm.size)

    def _step(self, now: Any) -> Exception | None:
        """Step on the sums; what all ranks refuse it with."""
        error, usable = None, False
        try:
            usable = now.usable(self._mean)
        except ValueError as e:  # where one rank has it, all have; but only one can name an element
            error = e
        if error is not None or (not usable and self._opt.on_nonfinite == "raise" and now.anything()):
            return agree(self.comm, "looked at the gradients", error)[0]
        if usable:
            self._exchange.step(now)
        now.finish()
        return None

    def _combine(self, partial: Any) -> None:
        """Complete the reductions of chunks by those of the other ranks: of each, all ranks but one have 0."""
        self.comm.Allreduce(MPI.IN_PLACE, np.asarray(partial), MPI.SUM)

    # --- what there is -----------------------------------------------------------------------------------------------

    @property
    def shares(self) -> list[tuple[int, int]]:
        """For each group the elements of its parameter space whose state this rank has.

        The parameter space of a group is its arrays, one after the other.
        """
        stores = [group.store for group in self._run.groups]
        return [(store.start, store.start + store.size) for store in stores]

    @property
    def state(self) -> dict[str, Any]:
        """By name the live state of this rank's share, flat; for a list of groups, a list with one array for each."""
        stores = [group.store for group in self._run.groups]
        names = dict.fromkeys(name for store in stores for name in store.arrays if name != "sums")
        found = {name: [store.arrays.get(name) for store in stores] for name in names}
        return found if self._run.plan.structured else {name: arrays[0] for name, arrays in found.items()}

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """A ``with`` block inside which the parameters are their averages, on all ranks.

        Its beginning and its end are collective.

        Yields
        ------
        None
            Nothing.

        Raises
        ------
        ValueError
            On all ranks, without ema_decay.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import SGD
        >>> from adaptive_c.mpi import Sharded
        >>> w = np.ones(2)
        >>> opt = Sharded(SGD, w, lr=0.5, ema_decay=0.75)
        >>> opt.step(np.ones(2))
        >>> with opt.averaged_parameters():
        ...     print(w)
        [0.875 0.875]
        """
        with self._collective():
            error, block = None, None
            try:
                block = self._opt.averaged_parameters()
                block.__enter__()
            except Exception as e:
                error = e
            refusal, _ = agree(self.comm, "called averaged_parameters", error)
            if refusal is None:
                self._exchange.step(None)
        if refusal is not None or block is None:
            if block is not None and error is None:
                block.__exit__(None, None, None)
            assert refusal is not None
            raise refusal
        try:
            yield
        finally:
            with self._collective():
                block.__exit__(None, None, None)
                self._exchange.step(None)

    def __reduce_ex__(self, protocol: Any) -> Never:
        raise TypeError(
            "Sharded can't be pickled or copied: it belongs to its communicator; save(path) keeps everything"
        )

    def __repr__(self) -> str:
        return f"Sharded({self._opt!r}, rank {self.comm.rank} of {self.comm.size})"

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, path: Any, *, parameters: bool = True) -> None:
        """Write one file, each rank its share, that any number of ranks and the plain optimizer can load.  Collective.

        It is the optimizer's checkpoint, written as atomically: `path` is the old file or the whole new one.

        Parameters
        ----------
        path : str or path-like
            A name in a folder that all ranks see.
        parameters : bool, default True
            Save them too.

        Raises
        ------
        OSError, ValueError
            On all ranks, if one of them can't write.  The old file is still there then.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import SGD
        >>> from adaptive_c.mpi import Sharded
        >>> opt = Sharded(SGD, np.ones(3), lr=0.5)
        >>> opt.save("run.safetensors")
        >>> again = SGD(np.empty(3))  # one process, or any number of ranks
        >>> again.load("run.safetensors")
        >>> again.param_groups[0]["lr"]
        0.5
        """
        with self._collective():
            refusal = _checkpoint.save(self._run, self.comm, path, parameters)
        if refusal is not None:
            raise refusal

    def load(self, path: Any, *, parameters: bool = True) -> None:
        """Load a file that `save` wrote on any number of ranks, or the plain optimizer's `save`, in place.  Collective.

        Each rank verifies a part of the file, and reads its share.

        Parameters
        ----------
        path : str or path-like
            A file that all ranks see.
        parameters : bool, default True
            Load them too.

        Raises
        ------
        OSError, TypeError, ValueError
            As from the optimizer's `load`, on all ranks.  Nothing has changed then, unless reading itself failed.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import SGD
        >>> from adaptive_c.mpi import Sharded
        >>> SGD(np.ones(3), lr=0.5).save("run.safetensors")
        >>> opt = Sharded(SGD, np.empty(3))
        >>> opt.load("run.safetensors")
        >>> opt.param_groups[0]["lr"]
        0.5
        """
        with self._collective():
            refusal, written = _checkpoint.load(self._run, self.comm, path, parameters)
            if refusal is None:
                self._exchange.step(None)
            elif written:
                raise refusal
        if refusal is not None:
            raise refusal


def _part_of(optimizer: Any, comm: Any) -> Any:
    """The class of an optimizer that has the state of this rank's share."""
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise TypeError(f"the first argument must be the class of an optimizer, such as adaptive_c.AdamW, "
                        f"got {optimizer!r}")  # fmt: skip
    return type(optimizer.__name__, (optimizer,), {"_part": (comm.rank, comm.size)})


def _threads(comm: Any) -> int | None:
    """The threads of a step where several ranks may use the same processors; None where each has its own."""
    here = comm.Split_type(MPI.COMM_TYPE_SHARED)
    own = processors()
    sharing = texts(here, str(sorted(own))).count(str(sorted(own)))
    here.Free()
    return max(1, len(own) // sharing) if sharing > 1 else None


def _crcs(run: Run) -> Iterator[int]:
    """A checksum of each group's parameters."""
    for group in run.groups:
        crc = 0
        for array in group.layout.arrays:
            crc = zlib.crc32(array.reshape(-1).view("uint8"), crc)
        yield crc


def _lines(name: str, value: Any) -> list[str]:
    """A nested dict, one line for each of its values."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return [f"{name}={value!r}"]
    return [line for key, x in items for line in _lines(f"{name}[{key!r}]" if name else str(key), x)]
