"""The methods of an optimizer that describe its run and restore it."""

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Literal, Never

from ._checkpoint import description, pickled, torch
from ._run.rule import Rule
from ._run.run import Run

_BOUND = ("_run", "_state_view", "_step")  # what an optimizer has while it is bound to its arrays


class Saving:
    """The methods of every optimizer that save, load and pickle it."""

    rule: ClassVar[Rule]
    _run: Run

    def _bind(self, run: Run) -> None:
        """Attach the optimizer to a run; `Optimizer` does it."""
        raise NotImplementedError

    def state_dict(self, *, format: Literal["torch"] | None = None) -> dict[str, Any]:  # noqa: A002
        """Describe all that a run depends on, except the parameters, by a dict of arrays, numbers and strings.

        The arrays are flat views, one for each group and state, and the next step changes them.  ``copy.deepcopy``
        keeps them, `save` writes them.

        Parameters
        ----------
        format : "torch", optional
            Make the dict that ``load_state_dict`` of the PyTorch optimizer of this name takes.  Its tensors are copies,
            with narrow state decoded.

        Returns
        -------
        dict
            What `load_state_dict` takes.

        Raises
        ------
        ValueError
            For another format, or if PyTorch has no such rule, or not with these options; if a count in
            ``state["step"]`` is out of its range, so that no load would accept it.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import SGD
        >>> opt = SGD(np.ones(2), lr=0.5, momentum=0.9)
        >>> opt.step(np.ones(2))
        >>> saved = opt.state_dict()
        >>> saved["t"], saved["groups"][0]["options"]["lr"]
        (1, 0.5)
        """
        if format not in (None, "torch"):
            raise ValueError(f"format must be 'torch' or None, got {format!r}")
        return description.state_dict(self._run) if format is None else torch.state_dict(self._run)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state in place: one that `state_dict` gave, or the state_dict of PyTorch's optimizer of this name.

        Options, schedules, counts and accumulated gradients become those of the dict.  (PyTorch's dict has no
        schedules, so those of this optimizer go on, and no accumulated gradients, so pending ones are dropped.)
        n_threads, copy_to, uint16_as and the structure stay.  The parameters may be cut differently, except for
        PyTorch's dict.  Put the parameters into place first, because copy_to is written anew.  After a load there is
        nothing to `rollback`.

        Parameters
        ----------
        state_dict : dict
            It is not changed, and nothing of it is kept.

        Raises
        ------
        TypeError, ValueError
            If something doesn't fit: class, formats, sizes, names of a dict, a cut that joins arrays with different
            counts; if a schedule's number is out of its range; if options followed a function of your own and this
            optimizer has none instead.  Nothing has changed then.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import SGD
        >>> opt, again = SGD(np.ones(2), lr=0.5), SGD(np.ones(2))
        >>> opt.step(np.ones(2))
        >>> again.load_state_dict(opt.state_dict())
        >>> again.t, again.param_groups[0]["lr"]
        (1, 0.5)
        """
        if isinstance(state_dict, Mapping) and "param_groups" in state_dict:
            torch.load_state_dict(self._run, state_dict)
        else:
            description.load_state_dict(self._run, state_dict)

    def save(self, path: Any, *, parameters: bool = True) -> None:
        """Write parameters, state, options and counts into one safetensors file, from which `load` continues the run.

        The file is written under another name in the same folder, synced and renamed, so that at every moment `path` is
        the old checkpoint or the new one.  Saving takes hardly any memory.

        Parameters
        ----------
        path : str or path-like
            The file's name, used as it is.
        parameters : bool, default True
            Save them too.

        Raises
        ------
        OSError
            If the file can't be written; then the old one is still there.  If at the end the folder can't be synced;
            then the new one is there, but may not survive a power cut.
        ValueError
            If the path is a folder or a device, or ends in .npz; if the parameters are in a dict with keys that another
            process can't recognise; if a count in ``state["step"]`` is out of its range.  The old file is still there.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import SGD
        >>> opt = SGD(np.ones(2), lr=0.5)
        >>> opt.step(np.ones(2))
        >>> opt.save("run.safetensors")
        >>> w = np.empty(2)
        >>> SGD(w).load("run.safetensors")
        >>> w
        array([0.5, 0.5])
        """
        description.save(self._run, path, parameters)

    def load(self, path: Any, *, parameters: bool = True) -> None:
        """Load a checkpoint that `save` wrote, in place.

        The whole file is verified before anything is taken from it.  Options, schedules, counts and accumulated
        gradients become those of the file; n_threads, copy_to, uint16_as and the structure stay, and copy_to is written
        anew.  The parameters may be cut differently, but each group needs the same number of elements.  After a load
        there is nothing to `rollback`.  If a Ctrl-C or a reading error interrupts it, load again before the next step.

        Parameters
        ----------
        path : str or path-like
            A file that `save` wrote, or an .npz file of version 0.1.
        parameters : bool, default True
            Load them too.

        Raises
        ------
        OSError
            If the file can't be read.
        TypeError, ValueError
            If the file is damaged or foreign, or something doesn't fit, as in `load_state_dict`.  Nothing has changed
            then.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import SGD
        >>> SGD(np.ones(2), lr=0.5).save("run.safetensors")
        >>> opt = SGD([np.empty(1), np.empty(1)])  # cut in another way
        >>> opt.load("run.safetensors")
        >>> opt.param_groups[0]["params"]
        (array([1.]), array([1.]))
        """
        description.load(self._run, path, parameters)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy; see docs/hosts.md."""
        if self._run.plan.pages is not None:
            raise TypeError("an optimizer with state_path can't be pickled or copied, since its state is on disk: "
                            "opt.save(path) keeps everything")  # fmt: skip
        kept = {name: value for name, value in vars(self).items() if name not in _BOUND}
        return {**kept, "_form": pickled.form(self._run)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        cls: Any = type(self)
        self.__class__ = _unbound(cls)

    def __copy__(self) -> Never:
        raise TypeError(
            f"copy.copy can't copy {type(self).__name__}: both would step the same arrays; copy.deepcopy copies the "
            "arrays with it, together with the object that holds both"
        )


def _bind_at_first_use(self: Any, name: str) -> Any:
    """Attach an unpickled optimizer to its arrays when an attribute of it is first needed, and return the attribute."""
    if name not in _BOUND:
        return object.__getattribute__(self, name)  # which says that it is not there
    held = vars(self)
    form = held.pop("_form", None)
    if form is None:
        raise RuntimeError("this optimizer is in use: another call, its first one, has not ended")
    try:
        if pickled.torn(form):
            raise RuntimeError("joblib.dump has written this optimizer's arrays apart from its model's, so that steps "
                               "would change arrays that the model does not read.  Call opt.rebind(arrays) with the "
                               "model's, for example in its __setstate__, or store the model by pickle or cloudpickle, "
                               "which keep them together")  # fmt: skip
        self._bind(pickled.run_of(self.rule._replace(label=type(self).__name__), form))
    except BaseException as error:
        held["_form"] = form
        error.add_note("raised when an optimizer that was unpickled or copied bound its arrays, at its first use")
        if isinstance(error, AttributeError):  # by which Python would mean that the optimizer has no such attribute
            raise RuntimeError(f"a schedule raised {error!r}") from error
        raise
    self.__class__ = type(self).__base__
    return getattr(self, name)


def _rebind_unbound(self: Any, params: Any) -> None:
    """The optimizer's own `rebind`, which also joins what joblib has torn.  If it is refused, all is as before."""
    cls: Any = type(self)
    held = vars(self)
    form = held.get("_form")
    if form is not None:
        if pickled.torn(form) and any(group["copy_to"] is not None for group in form["made_of"]["groups"]):
            raise ValueError("rebind can't join the arrays of copy_to, which joblib.dump has written apart from the "
                             "model's; store the model by pickle or cloudpickle")  # fmt: skip
        held["_form"] = {**form, "twice": (None, None)}
    try:
        cls.__base__.rebind(self, params)
    except BaseException:
        if form is not None:
            held["_form"] = form
            for name in _BOUND:
                held.pop(name, None)
            self.__class__ = cls
        raise


def _reduce_unbound(self: Any, protocol: Any) -> Any:
    """How pickle treats an optimizer that was never attached to a run."""
    return _blank, (type(self).__base__,), vars(self)


def _blank(cls: Any) -> Any:
    """An optimizer without a run, which pickle then fills."""
    return cls.__new__(cls)


@cache
def _unbound(cls: type) -> type:
    """The class of an optimizer that was unpickled or copied, until something needs its run.

    It binds its arrays only then.  While pickle loads, they may be empty still, and so may be the object whose method
    is a schedule.  And a model that is loaded for predictions alone may have arrays that can't be written.
    """
    own = {"__slots__": (), "__getattr__": _bind_at_first_use, "__reduce_ex__": _reduce_unbound}
    own["rebind"] = _rebind_unbound
    return type(cls.__name__, (cls,), {**own, "__module__": cls.__module__, "__doc__": cls.__doc__})
