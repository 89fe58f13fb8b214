"""An optimizer whose state is shared out among the ranks of an MPI communicator."""

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Never

from mpi4py import MPI

from .. import __version__
from .._native import processors
from .._optimizer import Optimizer
from .._run.options import Choice
from .._stepping import one_step
from ..typing import Params
from . import _checkpoint
from ._agreement import texts
from ._exchange import Exchange
from ._ranks import Ranks, agreed
from ._steps import Progress, Steps

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

    Every rank has all parameters, and the state of its share: n/ranks elements, cut at multiples of 4,096, and under
    second_moment="row" only where a row begins.  A step adds up the gradients of all ranks; each rank steps its share,
    and gives it to the others.  Parameters, state and counts have the bits of one process that calls `accumulate` with
    the gradients of rank 0, 1, 2 ... and then `step`, for any number of ranks, bucket size and threads.

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
        nor OMP_NUM_THREADS is given, ranks that may use the same processors share them out.  With state_path, each rank
        keeps the state of its share in a folder of its own in that one, named after the rank and the number of ranks.
        A step is durable on all ranks, or is none.  The path may be of a file system that all ranks see, or of disks of
        their own; it and state_memory may differ.

    Attributes
    ----------
    comm : mpi4py.MPI.Comm
        The duplicate.
    shares : list of (int, int)
        For each group the elements of its parameter space (its arrays, one after the other) whose state this rank has.
    state : dict
        By name the live state of this rank's share, flat; for a list of groups, a list with one array for each, or
        None.  Second moments by row are those of the rows in it.  ``"ema"`` and ``"master"`` are among it.
    t, param_groups, grad_norm, skipped_steps, pending, n_threads
        As of the optimizer.
    max_grad_norm, norm_over, max_grad_value, on_nonfinite, loss_scale, zero_grad, flush_denormals, seed
        As of the optimizer.  What is assigned must be assigned on all ranks; the next step checks that.
    nbytes, bytes_written : int
        Bytes of state on this rank, and bytes that it has written to its folder, as of the optimizer; the buffers for
        messages excluded.

    Raises
    ------
    TypeError, ValueError
        As the optimizer's class does; if the ranks give different parameters or options, with the first difference; if
        their folders are not those of one run of as many ranks.
    OSError
        With state_path, from any method that reads or writes it, on all ranks.
    RuntimeError
        From any method, if another rank gets a Ctrl-C before messages are under way; nothing has changed then.  From
        every method, once a call on this rank ended in the middle: by a Ctrl-C between messages, or a failure of MPI.
        With state_path, also once the state of one rank could not be brought to a whole step.

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
    bytes_written = _Passed()
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
        about = [f"the version of adaptive_c {__version__}", f"{reduction=}", f"{bucket_bytes=}"]
        self._ranks = ranks = Ranks(comm, about)
        try:
            with ranks.together("called the constructor"):
                about.append(f"keep_undo={bool(options.get('keep_undo'))}")
                mean = Choice("mean", "sum")("reduction", reduction) == "mean"
                if bucket_bytes is None:
                    bucket_bytes = max(_BUCKET, _MESSAGE * (comm.size - 1))
                elif isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int) or bucket_bytes < 1:
                    raise ValueError(f"bucket_bytes must be an integer from 1 on, got {bucket_bytes!r}")
                self._opt = _stepped_by(optimizer, ranks)(params, **options)
                self._run = self._opt._run
                self._exchange = Exchange(self._run, comm, bucket_bytes)
                self._steps = Steps(self._opt, self._run, ranks, self._exchange, mean)
        except BaseException as error:
            if hasattr(self, "_opt"):  # another rank raises it: the folder is let go of, so that all can try again
                self._opt.close()
            if agreed(error):
                comm.Free()
            raise
        plan = self._run.plan
        if self._opt.n_threads is None and "OMP_NUM_THREADS" not in os.environ:
            self._opt.n_threads = _threads(comm)
        copies = any(group.options["copy_to"] is not None for group in self._run.groups)
        if copies or (plan.pages is not None and plan.pages.parameters):
            self._exchange.step(None)  # of its share each rank has written copies, or parameters from its folder
        try:
            plan.raise_late()
        except BaseException:
            self.close()
            raise

    # --- steps -------------------------------------------------------------------------------------------------------

    def step(
        self,
        grads: Any = ...,
        metric: float | None = None,
        *,
        loss_scale: float | None = None,
        lr: float | Sequence[float | None] | None = None,
        progress: Progress | None = None,
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
        progress : callable, optional
            ``progress(done, total)`` is called as buckets of this rank's state on disk are done, as by the optimizer.

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
        name = type(self._opt).__name__
        self._steps.call(grads, lambda: one_step(self._run, name, metric, loss_scale, lr), progress)

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
        self._steps.call(grads, None)

    def rollback(self) -> None:
        """Undo the last call of `step`, once, on all ranks.  Collective.  Needs ``keep_undo=True`` in the constructor.

        It undoes what the optimizer's `rollback` does.  Each rank undoes its share, and gives the parameters of that to
        the others.  With state_path, this is durable on all ranks, or the step is still there on all of them.

        Raises
        ------
        ValueError
            As from the optimizer's `rollback`, on all ranks; if the ranks have made different calls.  Nothing has
            changed then.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import SGD
        >>> from adaptive_c.mpi import Sharded
        >>> w = np.ones(2)
        >>> opt = Sharded(SGD, w, lr=0.5, keep_undo=True)
        >>> opt.step(np.ones(2))
        >>> opt.rollback()
        >>> w, opt.t
        (array([1., 1.]), 0)
        """
        with self._ranks.collective():
            self._run.plan.rollback(lambda error: self._ranks.agree("called rollback", error))
            self._exchange.step(None)
        self._run.plan.raise_late()

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
        with self._run.looking():
            found = {name: [store.array(name) if name in store.arrays else None for store in stores] for name in names}
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
        with ExitStack() as block:
            with self._ranks.collective():
                with self._ranks.together("called averaged_parameters"):
                    block.enter_context(self._opt.averaged_parameters())
                self._exchange.step(None)
            try:
                self._run.plan.raise_late()  # a Ctrl-C that came while averages were read
                yield
            finally:
                with self._ranks.collective():
                    block.close()
                    self._exchange.step(None)

    def close(self) -> None:
        """Let go of this rank's folder of `state_path`.  To be called on all ranks, but not collective.

        As of the optimizer: every later call that steps, changes, saves or loads raises RuntimeError.

        Raises
        ------
        RuntimeError
            While another call is inside the optimizer.

        Examples
        --------
        >>> import tempfile
        >>> import numpy as np
        >>> from adaptive_c import AdamW
        >>> from adaptive_c.mpi import Sharded
        >>> folder = tempfile.mkdtemp()
        >>> Sharded(AdamW, np.ones(3), state_path=folder).close()
        >>> Sharded(AdamW, np.ones(3), state_path=folder).close()
        """
        self._opt.close()

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
        with self._ranks.collective():
            _checkpoint.save(self._run, self._ranks, path, parameters)

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
        with self._ranks.collective():
            _checkpoint.load(self._run, self._ranks, path, parameters)
            self._exchange.step(None)
        self._run.plan.raise_late()


def _stepped_by(optimizer: Any, ranks: Ranks) -> Any:
    """The class of an optimizer that has the state of this rank's share."""
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise TypeError(f"the first argument must be the class of an optimizer, such as adaptive_c.AdamW, "
                        f"got {optimizer!r}")  # fmt: skip
    return type(optimizer.__name__, (optimizer,), {"_company": ranks})


def _threads(comm: Any) -> int | None:
    """The threads of a step where several ranks may use the same processors; None where each has its own."""
    here = comm.Split_type(MPI.COMM_TYPE_SHARED)
    own = processors()
    sharing = texts(here, str(sorted(own))).count(str(sorted(own)))
    here.Free()
    return max(1, len(own) // sharing) if sharing > 1 else None
