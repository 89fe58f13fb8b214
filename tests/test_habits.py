"""What users of other libraries write: it works, or its error says what to write here."""

import copy
import inspect
import json
import pickle
import re

import numpy as np
import pytest

import adaptive_c as ac
from adaptive_c import schedules


def told(error, call):
    with pytest.raises(error) as caught:
        call()
    return str(caught.value.args[0])


# --- zero_grad -------------------------------------------------------------------------------------------------------


def test_zero_grad_is_a_setting_that_can_be_called():
    """Where steps zero their gradients there is nothing left to do; otherwise the error has the words for both ways."""
    w, grad = np.ones(3), np.ones(3)
    opt = ac.SGD(w, lr=0.25)
    message = told(TypeError, opt.zero_grad)
    assert message == told(TypeError, lambda: opt.zero_grad(set_to_none=True))
    for line in re.findall(r"opt\.zero_grad = True|grad\[\.\.\.\] = 0", message):
        grad[...] = 1
        exec(line, {"opt": opt, "grad": grad})
        opt.step(grad)
        assert not grad.any()
    opt.zero_grad()
    opt.zero_grad(set_to_none=False)
    assert opt.t == 2
    assert (w == 0.75).all()


@pytest.mark.parametrize("value", [True, False])
def test_zero_grad_reads_as_ever(value):
    opt = ac.SGD(np.ones(3), zero_grad=value)
    read = opt.zero_grad
    assert read == value
    assert bool(read) is value
    assert (repr(read), str(read), f"{read}") == (repr(value),) * 3
    assert {value: 1}[read] == 1
    for again in (copy.deepcopy(read), pickle.loads(pickle.dumps(read)), opt.state_dict()["settings"]["zero_grad"]):
        assert again is value
    assert json.dumps(opt.state_dict()["settings"]["zero_grad"]) == json.dumps(value)
    assert json.dumps(bool(read)) == json.dumps(value)
    assert json.loads(json.dumps(read)) == value  # as a number
    other = ac.SGD(np.ones(3), zero_grad=read)
    assert other.zero_grad == value
    opt.zero_grad = not read
    opt.zero_grad = other.zero_grad
    assert opt.zero_grad == value
    with pytest.raises(TypeError, match="zero_grad must be True or False, got 1"):
        opt.zero_grad = 1


# --- names of options ------------------------------------------------------------------------------------------------

OPTIONS = [
    ("Adam", "learning_rate", "lr"), ("SGD", "step_size", "lr"), ("SGD", "stepsize", "lr"), ("Adam", "beta_1", "betas"),
    ("Adam", "beta1", "betas"), ("Adam", "b1", "betas"), ("Lion", "b2", "betas"), ("Adam", "epsilon", "eps"),
    ("SGD", "b1", "momentum"), ("RMSprop", "rho", "alpha"), ("Adadelta", "alpha", "rho"), ("RMSprop", "decay", "alpha"),
    ("Adadelta", "decay", "rho"), ("Adagrad", "decay", "lr_decay"), ("Adam", "decay", "lr, with a schedule"),
    ("Adam", "eps_root", "eps_mode='inside'"), ("AdamW", "wd", "weight_decay"), ("Adam", "L2", "weight_decay"),
    ("Adam", "weigth_decay", "weight_decay"), ("Adam", "ema_momentum", "ema_decay"),
    ("Adagrad", "initial_accumulator", "initial_accumulator_value"),
]  # fmt: skip
SETTINGS = [
    ("Adam", "clipnorm", "max_grad_norm, with norm_over='array'"), ("Adam", "grad_clip", "max_grad_norm, with norm_over="),
    ("Adam", "clip_norm", "max_grad_norm?"), ("SGD", "global_clipnorm", "max_grad_norm?"), ("SGD", "clipvalue", "max_grad_value"),
    ("Adam", "loss_scale_factor", "loss_scale"), ("Adam", "random_state", "seed"), ("Adam", "max_gard_norm", "max_grad_norm"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "theirs", "ours"), [*OPTIONS, *SETTINGS])
def test_arguments_of_constructors(cls, theirs, ours):
    message = told(TypeError, lambda: getattr(ac, cls)(np.ones(3), **{theirs: 0.5}))
    assert message.startswith(f"{cls} has no argument {theirs!r} (did you mean {ours}")
    assert "; it has params, lr" in message


@pytest.mark.parametrize(("cls", "theirs", "ours"), OPTIONS)
def test_keys_of_groups(cls, theirs, ours):
    w = np.ones(3)
    opt = getattr(ac, cls)(np.ones(3))
    message = f"(did you mean {ours}"
    assert message in told(TypeError, lambda: getattr(ac, cls)([{"params": w, theirs: 0.5}]))
    assert message in told(TypeError, lambda: opt.add_param_group({"params": w, theirs: 0.5}))
    assert message in told(KeyError, lambda: opt.param_groups[0].__setitem__(theirs, 0.5))
    assert message in told(KeyError, lambda: opt.param_groups[0][theirs])
    assert opt.param_groups[0].get(theirs) is None
    assert theirs not in opt.param_groups[0]


def test_arguments_of_calls():
    opt = ac.SGD(np.ones(3))
    with pytest.raises(TypeError, match=r"has no argument .learning_rate. .did you mean lr"):
        ac.minimize(np.sum, np.ones(3), jac=np.ones_like, learning_rate=1)
    for call in (
        opt.step,
        opt.accumulate,
        opt.rebind,
        opt.stepping,
    ):  # Python's own, because a hint would slow down each call
        assert "unexpected keyword argument 'learning_rate'" in told(
            TypeError, lambda call=call: call(1, learning_rate=1)
        )


def test_a_setting_in_a_group():
    message = told(TypeError, lambda: ac.SGD([{"params": np.ones(3), "max_grad_norm": 1.0}]))
    assert "unknown option 'max_grad_norm' (it is of the optimizer as a whole)" in message


@pytest.mark.parametrize(("cls", "theirs", "ours"), [*OPTIONS, *SETTINGS])
def test_assigned_attributes(cls, theirs, ours):
    opt = getattr(ac, cls)(np.ones(3))
    message = told(AttributeError, lambda: setattr(opt, theirs, 0.5))
    option = re.match(r"\w+", ours)[0]
    if theirs in ("weigth_decay", "max_gard_norm"):  # of these nothing is found, since there are many attributes
        assert message == f"{cls} has no attribute {theirs!r} to assign"
        return
    place = f"opt.param_groups[0][{option!r}]" if option in opt.param_groups[0] else f"opt.{option}"
    assert message == f"{cls} has no attribute {theirs!r} to assign; did you mean {place} = 0.5?"
    eval(place, {"opt": opt})  # it is there


def test_what_is_like_nothing_gets_no_hint():
    opt = ac.SGD(np.ones(3))
    assert "did you mean" not in told(TypeError, lambda: ac.Adam(np.ones(3), zzz=1))
    assert "did you mean" not in told(TypeError, lambda: ac.Adam(np.ones(3), fused=True))
    assert "did you mean" not in told(KeyError, lambda: opt.param_groups[0][3])
    assert told(AttributeError, lambda: setattr(opt, "zzz", 1)) == "SGD has no attribute 'zzz' to assign"
    assert "(accumulate(grads) sums" in told(TypeError, lambda: ac.SGD(np.ones(3), gradient_accumulation_steps=4))


# --- names of attributes -----------------------------------------------------------------------------------------------

ATTRIBUTES = {
    "lr": "opt.param_groups[0]['lr']",
    "learning_rate": "opt.param_groups[0]['lr']",
    "betas": "opt.param_groups[0]['betas']",
    "eps": "opt.param_groups[0]['eps']",
    "weight_decay": "opt.param_groups[0]['weight_decay']",
    "momentum": "",
    "params": "opt.param_groups[0]['params']",
    "parameters": "opt.param_groups[0]['params']",
    "minimize": "adaptive_c.minimize(",
    "update": "opt.step(grads)",
    "apply_gradients": "opt.step(grads)",
    "init": "opt.state",
    "iterations": "opt.t",
    "beta_1": "opt.param_groups[0]['betas']",
    "clipnorm": "opt.max_grad_norm",
    "use_ema": "opt.param_groups[0]['ema_decay']",
    "bounds": "opt.param_groups[0]['bounds']",
    "rows": "opt.param_groups[0]['rows']",
    "epsilon": "opt.param_groups[0]['eps']",
    "alpha": "opt.param_groups[0]['lr']",
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_that_are_elsewhere(name):
    opt = ac.Adam(np.ones(3))
    hint = ATTRIBUTES[name]
    message = told(AttributeError, lambda: getattr(opt, name))
    assert message.startswith(f"'Adam' object has no attribute {name!r}")
    assert (f" (did you mean {hint}" in message) == bool(hint)
    for one in (opt, ac.Adam, copy.deepcopy(opt)):
        assert not hasattr(one, name)
        assert getattr(one, name, 5) == 5
    assert name not in dir(opt)
    assert told(AttributeError, lambda: getattr(ac.Adam, name)) == f"type object 'Adam' has no attribute {name!r}"


def test_every_option_is_an_attribute_that_is_elsewhere():
    for cls in (ac.SGD, ac.AdamW, ac.RMSprop, ac.Rprop):
        opt = cls(np.ones(3))
        for option in opt.param_groups[0]:
            message = told(AttributeError, lambda opt=opt, option=option: getattr(opt, option))
            assert f"(did you mean opt.param_groups[0][{option!r}]?)" in message


OF_GROUPS = {
    "lr": "opt.param_groups[1]['lr']",
    "learning_rate": "opt.param_groups[1]['lr']",
    "betas": "opt.param_groups[1]['betas']",
    "params": "opt.param_groups[1]['params']",
    "clipnorm": "opt.max_grad_norm",
    "zero_grad": "opt.zero_grad",
}


@pytest.mark.parametrize("name", OF_GROUPS)
def test_attributes_of_groups(name):
    opt = ac.Adam([{"params": np.ones(3)}, {"params": np.ones(3)}])
    group, place = opt.param_groups[1], OF_GROUPS[name]
    assert told(AttributeError, lambda: getattr(group, name)) == (
        f"'ParamGroup' object has no attribute {name!r} (did you mean {place}?)"
    )
    assert told(AttributeError, lambda: setattr(group, name, 0.5)) == (
        f"a parameter group has no attribute {name!r} to assign; did you mean {place} = 0.5?"
    )
    assert not hasattr(group, name)
    eval(place, {"opt": opt})  # it is there


def test_attributes_of_groups_and_states_that_are_like_nothing():
    opt = ac.Adam(np.ones(3))
    group = opt.param_groups[0]
    assert told(AttributeError, lambda: group.zzz) == "'ParamGroup' object has no attribute 'zzz'"
    assert (
        told(AttributeError, lambda: setattr(group, "zzz", 1)) == "a parameter group has no attribute 'zzz' to assign"
    )
    assert "'max_grad_norm' is not an option of Adam (it is of the optimizer as a whole: opt.max_grad_norm)" in told(
        KeyError, lambda: group.__setitem__("max_grad_norm", 1.0)
    )
    assert told(AttributeError, lambda: opt.state.exp_avg).endswith("(did you mean opt.state['exp_avg']?)")
    assert told(AttributeError, lambda: opt.state.zzz) == "'State' object has no attribute 'zzz'"
    assert group.schedules == {}
    for call in (pickle.dumps, copy.deepcopy, copy.copy):
        assert "opt.state_dict() has its arrays" in told(TypeError, lambda call=call: call(opt.state))
    pickle.dumps(opt.state_dict())


def test_a_subclass_may_have_such_a_name():
    class Mine(ac.SGD):
        def update(self, grads):
            self.step(grads)

        params = property(lambda self: self.param_groups[0]["params"])

    w = np.ones(3)
    Mine(w, lr=1.0).update(np.ones(3))
    assert not w.any()
    assert Mine(w).params is w


def test_the_step_is_looked_up_as_in_any_class():
    """A __getattr__ or __getattribute__ would slow down every step."""
    for base in ac.Adam.__mro__[:-1]:
        assert not {"__getattr__", "__getattribute__"} & vars(base).keys()


# --- names of schedules ------------------------------------------------------------------------------------------------

ARGUMENTS = [
    ("cosine", "T_max", "steps"), ("cosine", "eta_min", "end"), ("cosine", "lr", "base"), ("cosine", "alpha", "end, which is a rate"),
    ("linear", "total_iters", "steps"), ("linear", "end_factor", "end, which is a rate"), ("cosine_restarts", "T_0", "steps"),
    ("cosine_restarts", "T_mult", "mult"), ("one_cycle", "max_lr", "base"), ("one_cycle", "total_steps", "steps"),
    ("plateau", "min_lr", "min"), ("exponential", "decay_rate", "gamma"), ("step", "step_szie", "step_size"),
    ("multistep", "boundaries", "milestones"), ("warmup", "num_warmup_steps", "steps"), ("warmup", "init_lr", "start"),
    ("inverse_sqrt", "num_warmup_steps", "warmup_steps"), ("chain", "schedulers", "schedules"), ("polynomial", "end_value", "end"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "theirs", "ours"), ARGUMENTS)
def test_arguments_of_schedules(name, theirs, ours):
    cls = getattr(schedules, name)
    message = told(TypeError, lambda: cls(**{theirs: 1}))
    assert message.startswith(f"{name} has no argument {theirs!r} (did you mean {ours}")
    assert "; it has " in message
    assert re.match(r"\w+", ours)[0] in inspect.signature(cls).parameters


def test_schedules_hold_no_count():
    for name in ("last_epoch", "verbose", "optimizer"):
        assert "drop it" in told(TypeError, lambda name=name: schedules.step(1.0, 2, **{name: 3}))
    assert (
        told(TypeError, lambda: schedules.cosine(1.0, 2, zzz=3))
        == "cosine has no argument 'zzz'; it has base, steps, end"
    )
    assert "missing 2 required positional arguments" in told(TypeError, schedules.cosine)


def test_a_schedule_of_the_users_takes_its_own_arguments():
    """Hints are for the arguments of the schedules here."""

    class Halving(schedules.Schedule):
        def __init__(self, learning_rate, *, T_max=10):
            vars(self).update(learning_rate=learning_rate, T_max=T_max)

        def __call__(self, step):
            return self.learning_rate / 2 ** min(step, self.T_max)

    w = np.ones(3)
    opt = ac.SGD(w, lr=Halving(learning_rate=1.0, T_max=1))
    opt.step(np.ones(3))
    opt.step(np.ones(3))
    assert (w == -0.5).all()


MODULE = {
    "CosineAnnealingLR": "cosine", "StepLR": "step", "MultiStepLR": "multistep", "ExponentialLR": "exponential",
    "LinearLR": "linear", "PolynomialLR": "polynomial", "CosineAnnealingWarmRestarts": "cosine_restarts",
    "OneCycleLR": "one_cycle", "ReduceLROnPlateau": "plateau", "SequentialLR": "chain", "ConstantLR": "constant",
    "warmup_cosine_decay_schedule": "warmup", "CosineDecay": "cosine", "cosine_decay_schedule": "cosine",
}  # fmt: skip


@pytest.mark.parametrize("theirs", MODULE)
def test_schedules_by_their_names_elsewhere(theirs):
    ours = MODULE[theirs]
    assert ours in schedules.__all__
    for module, place in ((schedules, ours), (ac, f"schedules.{ours}")):
        message = told(AttributeError, lambda module=module: getattr(module, theirs))
        assert message == f"module {module.__name__!r} has no attribute {theirs!r} (did you mean {place}?)"
        assert not hasattr(module, theirs)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    {"RMSProp": "RMSprop", "adam": "Adam", "AdaGrad": "Adagrad", "Nadam": "NAdam", "GradScaler": "the option loss_scale='dynamic'",
     "lr_scheduler": "adaptive_c.schedules", "clip_grad_norm_": "the option max_grad_norm", "Minimize": "minimize",
     "mpi": "import adaptive_c.mpi, which needs the extra 'mpi'", "SparseAdam": "Adam, with gradients of Rows", "LambdaLR": "any function of the step", "load": "opt.load(path)"}.items(),
)  # fmt: skip
def test_names_of_the_package(theirs, ours, monkeypatch):
    monkeypatch.delattr(ac, theirs, raising=False)  # a submodule that another test has imported
    message = told(AttributeError, lambda: getattr(ac, theirs))
    assert message.startswith(f"module 'adaptive_c' has no attribute {theirs!r} (did you mean {ours}")


def test_names_that_are_nowhere():
    for module in (ac, schedules):
        assert (
            told(AttributeError, lambda module=module: module.zzz)
            == f"module {module.__name__!r} has no attribute 'zzz'"
        )
        assert not hasattr(module, "__path_of_nothing__")
    assert "did you mean lr?" in told(
        TypeError, lambda: ac.minimize(np.sum, np.ones(3), jac=np.ones_like, learning_rate=1)
    )


def test_a_subclass_may_have_its_own_settings():
    """They are asked, whatever is assigned."""
    seen = []

    class Noted(ac.AdamW):
        @property
        def max_grad_norm(self):
            return seen[-1]

        @max_grad_norm.setter
        def max_grad_norm(self, value):
            seen.append(value)

        @property
        def zero_grad(self):
            return False

    opt = Noted(np.ones(2), max_grad_norm=1.0)
    opt.max_grad_norm = 2.0
    assert seen == [2.0]
    with pytest.raises(AttributeError, match="zero_grad"):
        opt.zero_grad = True
    other = ac.AdamW(np.ones(2), max_grad_norm=1.0)
    other.max_grad_norm = 2.0
    assert (other.max_grad_norm, seen) == (2.0, [2.0])
