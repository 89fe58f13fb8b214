"""Parameters in every structure, groups, state, counts, flatten, threads."""

import numpy as np
import pytest
from cases import IDS, PAIRS
from support import CHUNK, assert_same_bits, build, step_range

import adaptive_c as ac

W = np.arange(6, dtype="float32").reshape(2, 3)
B = np.ones(3, "float32")


def test_parameters_are_updated_where_they_are():
    flat = np.ones(10, "float32")
    view = flat[2:8].reshape(2, 3)
    opt = ac.SGD(view, lr=0.5)
    g = np.ones((2, 3), "float32")
    g.flags.writeable = False
    opt.step(g)
    np.testing.assert_array_equal(flat, [1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1, 1])
    assert np.shares_memory(opt.param_groups[0]["params"], flat)


@pytest.mark.parametrize("container", ["array", "list", "tuple", "dict", "groups"])
def test_structures(container):
    w, b = W.copy(), B.copy()
    gw, gb = np.ones_like(w), np.full_like(b, 2)
    params, grads = {
        "array": (w, gw),
        "list": ([w, b], [gw, gb]),
        "tuple": ((w, b), (gw, gb)),
        "dict": ({"w": w, "b": b}, {"b": gb, "w": gw}),  # by key, whatever the order
        "groups": ([{"params": {"w": w}}, {"params": [b], "lr": 0.25}], [{"w": gw}, [gb]]),
    }[container]
    opt = ac.Momentum(params, lr=0.5)
    opt.step(grads)
    np.testing.assert_array_equal(w, W - 0.5)
    state = opt.state["momentum_buffer"]
    if container == "array":
        assert state.shape == w.shape
        return
    np.testing.assert_array_equal(b, B - (0.5 if container == "groups" else 1.0))
    first, second = {"dict": lambda: (state["w"], state["b"]), "groups": lambda: (state[0]["w"], state[1][0])}.get(
        container, lambda: state
    )()
    assert first.shape == w.shape
    assert second.shape == b.shape
    assert np.shares_memory(opt.state["momentum_buffer"][0]["w"] if container == "groups" else first, first)
    first[...] = 0  # the live array
    opt.step(grads)
    np.testing.assert_array_equal(w, W - 1.0)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,), (2, 3, 4, 5)])
@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
def test_any_shape(name, options, shape):
    p = np.ones(shape)
    opt = build(name, p, options)
    opt.step(np.ones(shape))
    assert opt.t == 1
    by_row = options.get("second_moment") == "row"
    for name, value in opt.state.items():
        moment = by_row and name in opt.rule.state and opt.rule.state[name].moment
        assert value.shape in ((*shape[:1], *(1,) * (len(shape) - 1)) if moment else shape, ())


def test_none_leaves_an_array_alone_with_its_state_and_count():
    w, b = W.copy(), B.copy()
    opt = ac.Adam([w, b])
    opt.step([None, np.ones_like(b)])
    np.testing.assert_array_equal(w, W)
    assert [int(n) for n in opt.state["step"]] == [0, 1]
    assert opt.t == 1
    opt.step([None, None])
    assert opt.t == 1  # not a step
    opt.step([np.ones_like(w), None])
    assert [int(n) for n in opt.state["step"]] == [1, 1]
    assert opt.t == 2
    # its first step is a first step: lr in size, whatever the other array has done
    np.testing.assert_allclose(W - w, 1e-3, rtol=1e-3)


def test_groups_have_options_of_their_own_and_one_sweep():
    a, b = np.ones(3 * CHUNK + 1, "float32"), np.ones(5)
    opt = ac.SGD([{"params": a}, {"params": [b], "lr": 0.25, "weight_decay": 1.0}], lr=0.5)
    assert [group["lr"] for group in opt.param_groups] == [0.5, 0.25]
    opt.step([np.ones_like(a), [np.ones_like(b)]])
    assert (a == 0.5).all()
    assert (b == 0.5).all()  # 1 - 0.25 (1 + 1)
    opt.param_groups[1]["lr"] = 0.0
    opt.step([None, [np.ones_like(b)]])
    assert (b == 0.5).all()


def test_options_are_checked_when_assigned_and_nothing_changes_on_refusal():
    opt = ac.AdamW(W.copy())
    group = opt.param_groups[0]
    before = dict(group)
    for name, value, message in [
        ("lr", -1.0, r"lr must be in \[0, inf\), got -1.0"),
        ("lr", float("nan"), "lr must be"),
        ("lr", float("inf"), "lr must be"),
        ("lr", "fast", "lr must be a number"),
        ("betas", (0.9, 1.0), r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ("betas", 0.9, "betas must be a pair"),
        ("eps", 1e-60, "rounds to 0 in float32"),
        ("eps_mode", "around", "eps_mode must be 'outside' or 'inside' or 'hat', got 'around'"),
        ("maximize", 1, "maximize must be True or False"),
        ("amsgrad", True, "would need new state"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            group[name] = value
        assert dict(group).keys() == before.keys()
        assert all(group[key] == before[key] for key in before if key != "params")
    with pytest.raises(KeyError, match="'momentum' is not an option of AdamW"):
        group["momentum"] = 0.9
    with pytest.raises(TypeError, match="params is read-only"):
        group["params"] = W
    with pytest.raises(TypeError, match="can't be removed"):
        del group["lr"]
    group.update(lr=0.5, eps=0.0)
    assert group["lr"] == 0.5
    assert "lr': 0.5" in repr(group)


@pytest.mark.parametrize("name", ["eta_minus", "eta_plus"])
def test_the_end_of_an_open_interval_is_outside(name):
    opt = ac.SuperSAB(W.copy())
    group = opt.param_groups[0]
    before = group[name]
    with pytest.raises(ValueError, match=rf"{name} must be in \("):
        group[name] = 1.0
    assert group[name] == before
    group[name] = lambda t: before if t == 0 else 1.0
    opt.step(W)
    with pytest.raises(ValueError, match=rf"at t=1 {name} must be in \("):
        opt.step(W)


def test_group_params_are_read_only():
    opt = ac.SGD([{"params": [W.copy()]}, {"params": {"b": B.copy()}}])
    assert isinstance(opt.param_groups[0]["params"], tuple)
    with pytest.raises(TypeError):
        opt.param_groups[1]["params"]["c"] = B


@pytest.mark.parametrize(("cls", "option", "value"), [("RMSprop", "momentum", 0.9), ("RMSprop", "centered", True),
                                                     ("Adam", "amsgrad", True), ("SGD", "momentum", 0.9)])  # fmt: skip
def test_switches_that_need_state_are_refused_and_their_state_is_not_allocated(cls, option, value):
    opt = getattr(ac, cls)(W.copy())
    with_it = getattr(ac, cls)(W.copy(), **{option: value})
    assert with_it.nbytes == opt.nbytes + W.nbytes
    with pytest.raises(ValueError, match="would need new state"):
        opt.param_groups[0][option] = value
    with_it.param_groups[0][option] = type(value)(0)  # off, and on again: the state is there
    with_it.param_groups[0][option] = value


def test_a_switch_that_is_on_in_one_group_only():
    opt = ac.Adam([{"params": [W.copy()]}, {"params": B.copy(), "amsgrad": True}])
    opt.step([[np.ones_like(W)], np.ones_like(B)])
    assert opt.state["max_exp_avg_sq"][0] is None
    assert opt.state["max_exp_avg_sq"][1].shape == (3,)


def test_state_names_and_t():
    opt = ac.NAdam(W.copy())
    assert list(opt.state) == ["exp_avg", "exp_avg_sq", "step", "mu_product"]
    assert "exp_avg" in repr(opt.state)
    with pytest.raises(KeyError, match="this optimizer; it has exp_avg"):
        opt.state["variance"]
    opt.t = 10
    assert opt.t == opt.state["step"] == 10
    fresh = ac.NAdam(W.copy())
    for _ in range(10):
        fresh.step(np.zeros_like(W))
    assert opt.state["mu_product"] == fresh.state["mu_product"]  # to the bit
    for bad, error in ((-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="t must be"):
            opt.t = bad


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "Rprop", "SuperSAB"])
def test_the_state_can_be_saved_and_put_back_by_hand(name):
    """As the message that refuses pickling says: assign t, then write the saved values."""

    def make():
        p = [np.full(3, 2.0), np.full(2, 2.0), np.full(2, 2.0)]
        return p, getattr(ac, name)(p, **({"momentum": 0.9, "dampening": 0.5} if name == "SGD" else {}))

    def steps(p, opt, first, last):
        for t in range(first, last):
            opt.step([p[0] * 0.5, None if t % 2 else p[1] * 0.5, p[2] * 0.5 if t > 4 else None])

    p, opt = make()
    steps(p, opt, 0, 3)
    saved = {key: [np.array(x) for x in values] for key, values in opt.state.items()}
    q, other = make()
    for a, b in zip(q, p, strict=True):
        a[...] = b
    other.t = opt.t
    for key, values in saved.items():
        for live, value in zip(other.state[key], values, strict=True):
            live[...] = value
    steps(p, opt, 3, 9)
    steps(q, other, 3, 9)
    for a, b in zip(q, p, strict=True):
        assert_same_bits(a, b)


def test_assigning_t_says_that_state_is_there():
    p = np.zeros(2)
    opt = ac.SGD(p, lr=1.0, momentum=0.5)
    opt.state["momentum_buffer"][:] = 4.0
    opt.t = 7
    opt.step(np.zeros(2))
    np.testing.assert_array_equal(p, [-2, -2])
    opt.t = 0  # and 0 that it is not
    opt.step(np.zeros(2))
    np.testing.assert_array_equal(p, [-2, -2])


def test_t_0_says_that_no_step_has_written_the_state():
    p = np.zeros(2)
    opt = ac.SGD(p, lr=1.0, momentum=0.5)
    opt.step(np.ones(2))
    opt.t = 0
    opt.param_groups[0]["momentum"] = 0.0
    opt.step(np.zeros(2))  # writes none
    opt.param_groups[0]["momentum"] = 0.5
    opt.step(np.zeros(2))  # so that this one begins it, at the gradient
    np.testing.assert_array_equal(p, -1)


def test_arrays_of_equal_counts_whose_state_differs_are_told_apart():
    p = [np.zeros(2), np.zeros(2)]
    opt = ac.SGD(p, lr=1.0, momentum=0.5, dampening=0.5)
    opt.step([np.ones(2), None])
    opt.param_groups[0]["momentum"] = 0.0
    opt.step([None, np.ones(2)])  # writes no state
    opt.param_groups[0]["momentum"] = 0.5
    opt.step([np.ones(2), np.full(2, 3.0)])  # the buffers: 0.5 + 0.5 * 1, and 3 as at the first step
    np.testing.assert_array_equal(p, [[-2, -2], [-4, -4]])


def test_mistakes_that_would_do_nothing_are_refused():
    opt = ac.Adam([W.copy(), B.copy()])
    with pytest.raises(
        AttributeError, match=r"Adam has no attribute 'lr' to assign; .* opt.param_groups\[0\]\['lr'\] = 0.1"
    ):
        opt.lr = 0.1
    with pytest.raises(AttributeError, match=r"Adam has no attribute 'defaults' to assign$"):
        opt.defaults = {}
    with pytest.raises(KeyError, match="is no state of this optimizer; it has exp_avg"):
        opt.state[W]
    with pytest.raises(AttributeError):
        opt.param_groups = []
    with pytest.raises(TypeError):
        opt.state["exp_avg"][0] = W  # would replace an entry of a temporary, not the state
    with pytest.raises(AttributeError):
        opt.param_groups.append({})


def test_a_huge_momentum_decay_or_t_ends():
    opt = ac.NAdam(np.ones(4), momentum_decay=1e19)
    opt.step(np.ones(4))
    opt.t = 10**15
    opt.step(np.ones(4))
    assert np.isfinite(opt.param_groups[0]["params"]).all()


def test_state_arrays_start_apart_from_each_other_within_a_page():
    """And from 0, where large parameters and gradients start: a load would wait for a store to the same place of a page."""
    opt = ac.Adam(np.ones(1 << 21, "float32"), amsgrad=True, ema_decay=0.9)
    arrays = [*(opt.state[name] for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")), opt.ema]
    places = sorted([0, *(x.ctypes.data % 4096 for x in arrays), 4096])
    assert min(np.diff(places)) >= 512
    assert all(place % 64 == 0 for place in places)


def test_state_is_freed_with_the_optimizer():
    import gc
    import weakref

    gc.disable()
    try:
        opt = ac.Adam(W.copy())
        plan = weakref.ref(opt)
        del opt
        assert plan() is None  # no cycle that waits for the garbage collector
    finally:
        gc.enable()


def test_repr_and_nbytes():
    opt = ac.AdamW([W.copy(), B.copy()], lr=3e-4)
    assert repr(opt).startswith("AdamW(lr=0.0003, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, amsgrad=False")
    assert "t=0, 9 float32 elements)" in repr(opt)
    assert opt.nbytes == 2 * 9 * 4
    assert ac.Rprop(np.ones(8, "float32")).nbytes == 8 * 5  # the sign is one byte


def test_flatten():
    w, b = np.arange(6.0).reshape(2, 3), np.array([7.0])
    flat, views = ac.flatten({"w": w, "b": b})
    np.testing.assert_array_equal(flat, [0, 1, 2, 3, 4, 5, 7])
    assert list(views) == ["w", "b"]
    assert views["w"].shape == (2, 3)
    grad, twins = ac.flatten(views, like=flat)
    assert not grad.any()
    twins["w"][0, 1] = 3
    assert grad[1] == 3
    opt = ac.SGD(flat, lr=1.0)
    opt.step(grad)
    assert views["w"][0, 1] == -2
    assert w[0, 1] == 1  # the values were copied
    flat, views = ac.flatten((w, np.full((), 3.0)))
    assert isinstance(views, tuple)
    assert views[1].shape == ()
    assert ac.flatten([])[0].size == 0
    for bad, message in [
        ([w, b.astype("float32")], "dtype float32"),
        ([1.0], "not a numpy.ndarray"),
        (w, "must be a dict"),
    ]:
        with pytest.raises(TypeError, match=message):
            ac.flatten(bad)
    with pytest.raises(ValueError, match=r"shape \(6,\)"):
        ac.flatten([w], like=flat)


def test_ranges_are_multiples_of_the_chunk_or_the_end():
    n = 2 * CHUNK + 10
    opt = ac.SGD([{"params": np.ones(n)}, {"params": np.ones(5)}], lr=1.0)
    grads = [np.ones(n), np.ones(5)]
    for group, lo, hi in [
        (0, 1, n),
        (0, 0, CHUNK + 1),
        (0, CHUNK, 0),
        (0, -CHUNK, n),
        (0, 0, n + 1),
        (1, 0, 3),
        (2, 0, 5),
        (-1, 0, 5),
    ]:
        with pytest.raises(ValueError, match=r"multiples of 4096 or the end|needs a group"):
            step_range(opt, grads, group, lo, hi)
    step_range(opt, grads, 0, CHUNK, 2 * CHUNK, count=False)
    p = opt.param_groups[0]["params"]
    assert (p[:CHUNK] == 1).all()
    assert (p[CHUNK : 2 * CHUNK] == 0).all()
    assert (p[2 * CHUNK :] == 1).all()
    assert opt.t == 0


def test_threads():
    assert ac.get_num_threads() >= 1
    opt = ac.SGD(W.copy(), n_threads=3)
    assert opt.n_threads == 3
    opt.n_threads = None
    assert opt.n_threads is None
    ac.set_num_threads(5)
    assert ac.get_num_threads() == 5
    ac.set_num_threads(None)
    for bad, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError)):
        with pytest.raises(error, match="n_threads must be"):
            ac.set_num_threads(bad)
        with pytest.raises(error, match="n_threads must be"):
            ac.SGD(W.copy(), n_threads=bad)


def test_threadpoolctl_limits_are_obeyed():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with threadpoolctl.threadpool_limits(1):
        assert ac.get_num_threads() == 1


def test_many_arrays_of_many_sizes_equal_one():
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 2000, 300)
    flat = rng.normal(size=sizes.sum()).astype("float32")
    parts = np.split(flat.copy(), np.cumsum(sizes)[:-1])
    one, many = ac.AdamW(flat), ac.AdamW([part.copy() for part in parts], n_threads=3)
    for _ in range(3):
        g = rng.normal(size=flat.size).astype("float32")
        one.step(g)
        many.step(np.split(g, np.cumsum(sizes)[:-1]))
    assert_same_bits(np.concatenate(many.param_groups[0]["params"]), flat)
