"""What pickle must find by name: programs that hold an optimizer, and what they give it."""

import copy
import pickle

import numpy as np

import adaptive_c as ac


class Model:
    """Two arrays, their optimizer, and a loss whose gradient is easy: each array is to become 3."""

    def __init__(self, cls=ac.AdamW, dtype="float32", **options):
        self.w, self.b = np.ones((20, 30), dtype), np.zeros(5, dtype)
        self.opt = cls({"w": self.w, "b": self.b}, **options)

    def fit(self, steps=3):
        for _ in range(steps):
            self.opt.step({"w": self.w - 3, "b": self.b - 3})
        return self


class OwnSchedule(Model):
    """Its schedule is a method of its own, which needs an attribute that is there only when all is loaded."""

    def __init__(self):
        self.base = 0.1
        super().__init__(lr=self.rate)

    def rate(self, t):
        return self.base / (1 + t)

    def __getstate__(self):
        return {"opt": self.opt, **vars(self)}  # the optimizer before what its schedule needs

    def __setstate__(self, state):
        vars(self).update(state)


class Rejoined(Model):
    """Says itself which arrays are its optimizer's, as docs/hosts.md says for joblib."""

    def __setstate__(self, state):
        vars(self).update(state)
        self.opt.rebind({"w": self.w, "b": self.b})


class Knowing(np.ndarray):
    """An array that knows its optimizer, and says so to pickle."""

    opt = None

    def __reduce__(self):
        make, args, state = super().__reduce__()
        return make, args, (state, self.opt)

    def __setstate__(self, state):
        super().__setstate__(state[0])
        self.opt = state[1]

    def __deepcopy__(self, memo):
        new = memo[id(self)] = np.array(self, copy=True, subok=True)
        new.opt = copy.deepcopy(self.opt, memo)
        return new


class Mine(ac.Adam):
    """A rule of the user's, which keeps something of its own."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self._history = []

    def step(self, grads, **rest):
        super().step(grads, **rest)
        self._history.append(self.t)


class Watching:
    """A schedule that makes a copy of its optimizer."""

    opt = None

    def __call__(self, t):
        if self.opt is not None:
            copy.deepcopy(self.opt)
        return 0.1


class Nested:
    """A schedule that uses its optimizer, which can't be used yet when it is bound."""

    opt = None

    def __call__(self, t):
        return 0.1 if self.opt is None else 0.1 + 0 * self.opt.t


class Between:
    """A schedule that has numbers for some steps only."""

    def __init__(self, first, end):
        self.steps = range(first, end)

    def __call__(self, t):
        if t not in self.steps:
            raise AttributeError(f"nothing for {t}")
        return 0.1


class ForScikitLearn:
    """What an MLP of scikit-learn asks of its optimizer, stepped by ours."""

    def __init__(self, params, **options):
        self.opt = ac.Adam(params, **options)

    def update_params(self, params, grads):
        self.opt.step(grads)

    def iteration_ends(self, time_step):
        """Nothing: a schedule of ours follows the steps."""

    def trigger_stopping(self, msg, verbose):
        return True


def round_trip(protocol):
    def copied(x):
        return pickle.loads(pickle.dumps(x, protocol))

    copied.__name__ = f"pickle{protocol}"
    return copied


WAYS = [copy.deepcopy, *map(round_trip, range(pickle.HIGHEST_PROTOCOL + 1))]
