"""What an optimizer holds is freed with it, also in a cycle; and its groups, like itself, can't be copied."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest

import adaptive_c as ac


class Parameter(np.ndarray):
    """An array that can be referred to weakly, and can refer to anything."""


class Marker:
    def __call__(self, t):
        return 0.1


def parameter(n=1000):
    return np.ones(n, "f4").view(Parameter)


def link_parameter():
    p = parameter()
    p.opt = ac.AdamW(p, ema_decay=0.5, keep_undo=True)
    return p.opt, p


def link_list():
    p, q = parameter(), parameter()
    p.opt = q.opt = ac.AdamW([p, q])
    return p.opt, p, q


def link_dict():
    p = parameter()
    p.opt = ac.SGD({"a": p, "b": np.ones(3, "f4")}, momentum=0.9)
    return p.opt, p


def link_groups():
    p, q = parameter(), parameter()
    opt = ac.AdamW([{"params": p}, {"params": np.ones(3, "f4")}])
    opt.add_param_group({"params": [q]})
    p.opt, q.group = opt, opt.param_groups[2]
    return opt, p, q


def link_group():
    p = parameter()
    opt = ac.AdamW(p)
    p.group, p.state = opt.param_groups[0], opt.state
    return opt, p


def link_gradient():
    p, g = parameter(), parameter()
    opt = ac.AdamW(p)
    g.opt = opt
    opt.step(g)
    opt.accumulate(g)
    return opt, p, g


def link_schedule():
    p, schedule = parameter(), Marker()
    opt = ac.AdamW(p, lr=schedule, betas=(0.9, schedule))
    schedule.opt = opt
    opt.step(np.ones(1000, "f4"))
    return opt, p, schedule


def link_loaded():
    p = parameter()
    p.opt = ac.AdamW(p)
    p.opt.step(np.ones(1000, "f4"))
    p.opt.load_state_dict(copy.deepcopy(p.opt.state_dict()))
    p.opt.accumulate(np.ones(1000, "f4"))
    return p.opt, p


def link_dynamic():
    p = parameter()
    p.opt = ac.AdamW(p, loss_scale="dynamic", max_grad_norm=1.0)
    p.opt.step(np.ones(1000, "f4"))
    return p.opt, p


LINKS = [link_parameter, link_list, link_dict, link_groups, link_group, link_gradient, link_schedule, link_loaded,
         link_dynamic]  # fmt: skip


def alive(refs):
    """The kinds of what the references still find."""
    return [type(ref()).__name__ for ref in refs if ref() is not None]


@pytest.mark.parametrize("link", LINKS)
def test_a_cycle_is_freed(link):
    refs = [weakref.ref(x) for x in link()]
    gc.collect()
    assert alive(refs) == []


def test_without_a_cycle_nothing_waits_for_the_collector():
    p = parameter()
    opt = ac.AdamW(p, lr=Marker(), ema_decay=0.5)
    opt.step(np.ones(1000, "f4"))
    refs = [weakref.ref(p), weakref.ref(opt), weakref.ref(opt.state["exp_avg"].base)]
    enabled = gc.isenabled()
    gc.disable()
    try:
        del opt, p
        assert alive(refs) == []
    finally:
        if enabled:
            gc.enable()


def test_a_failed_construction_holds_nothing():
    p, q = parameter(), parameter()
    refs = [weakref.ref(p), weakref.ref(q)]
    for wrong in (
        {"lr": -1.0},
        {"lr": lambda t: None},
        {"copy_to": [q, q]},
        {"state_dtype": "uint8", "master": "float32"},
    ):
        with pytest.raises((TypeError, ValueError)):
            ac.AdamW([p, q], **wrong)
    with pytest.raises(ValueError, match="share memory"):
        ac.AdamW([p, q, p])
    del p, q
    gc.collect()
    assert alive(refs) == []


def test_a_group_in_use_keeps_what_it_shows():
    """The optimizer may be gone."""
    p = parameter(3)
    group = ac.AdamW(p, lr=0.25).param_groups[0]
    gc.collect()
    assert group["lr"] == 0.25
    assert group["params"] is p
    assert dict(group)["betas"] == (0.9, 0.999)


def test_an_optimizer_that_is_alive_is_not_cleared():
    """Nothing that the collector looks through is lost."""
    opt, p = link_parameter()
    for _ in range(3):
        gc.collect()
        opt.step(np.ones(1000, "f4"))
    opt.rollback()
    assert opt.t == 2
    assert opt.state["step"] == 2
    assert (np.asarray(p) < 1).all()


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "deepcopy of all": lambda group: copy.deepcopy((group,)),
    "deepcopy in a list": lambda group: copy.deepcopy([group, 1]),
    "old pickle": lambda group: pickle.dumps(group, 0),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_group_is_not_copied(make):
    """A copy would steer the optimizer unseen, or seem to."""
    opt = ac.SGD([{"params": np.zeros(3)}, {"params": np.zeros(2)}], lr=0.1)
    for group in opt.param_groups:
        with pytest.raises(TypeError, match=r"can't be pickled or copied.*dict\(group\)"):
            make(group)


def test_the_remedy_of_that_message():
    w = np.zeros(3)
    opt = ac.SGD(w, lr=0.1, momentum=0.5)
    group = opt.param_groups[0]
    kept = dict(group)
    kept["lr"] = 5.0
    assert group["lr"] == 0.1
    opt.step(np.ones(3))
    np.testing.assert_array_equal(w, -0.1)
    del kept["params"]
    assert copy.deepcopy(kept) == kept
    again = ac.SGD([{"params": np.zeros(3), **kept}])
    assert again.param_groups[0]["lr"] == 5.0
    assert again.param_groups[0]["momentum"] == 0.5
    for name, value in kept.items():
        if value is not None:
            group[name] = value
    assert group["lr"] == 5.0
