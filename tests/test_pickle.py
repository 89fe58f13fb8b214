"""Pickled and copied optimizers: the copy steps the arrays of the copy, and goes on with the same bits."""

import copy
import mmap
import os
import pickle
import threading

import hosts
import numpy as np
import pytest
import resume
from hosts import WAYS, Between, Knowing, Mine, Model, Nested, OwnSchedule, Rejoined, Watching
from support import assert_same, assert_same_bits, child, everything

import adaptive_c as ac

each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


# --- the link, and the bits ------------------------------------------------------------------------------------------


@each_way
def test_the_copy_steps_the_arrays_of_the_copy(way):
    model = Model(lr=0.1).fit()
    before, saved = model.w.copy(), everything(model.opt)
    again = way(model)
    assert again.opt.param_groups[0]["params"]["w"] is again.w
    assert_same(everything(again.opt), saved)
    again.fit()
    assert_same_bits(model.w, before)
    model.fit()
    assert (model.w != before).all()
    assert_same_bits(again.w, model.w)
    assert_same(everything(again.opt), everything(model.opt))
    assert type(again.opt) is ac.AdamW


@each_way
@pytest.mark.parametrize("order", ["w opt opt", "opt w opt", "opt opt w"])
def test_whatever_comes_first(way, order):
    """pickle and deepcopy meet the array before the optimizer or after it, and the optimizer more than once."""
    w = np.ones(3)
    there = {"w": w, "opt": ac.SGD(w, lr=0.5)}
    again = dict(zip(order.split(), way([there[name] for name in order.split()]), strict=False))
    again["opt"].step(np.ones(3))
    assert (again["w"] == 0.5).all()
    assert (w == 1).all()


@pytest.mark.parametrize("part", range(8))
def test_the_bits_of_every_rule_format_and_option(part, monkeypatch):
    """Rules, formats, schedules, loss scales, sums, averages, bounds, copies: as test_resume.py draws them."""
    monkeypatch.setattr(resume, "SIZE", 1009)
    monkeypatch.setattr(resume, "cut", lambda flat, pieces, rng: flat)
    monkeypatch.setattr(resume, "shaped_as", lambda flat, like: flat)
    for number in range(part, len(resume.GRID), 8):
        run = resume.Run(number, 1)
        for _ in range(run.stop):
            run.go()
        again = WAYS[number % len(WAYS)](run)
        for _ in range(run.stop, resume.STEPS * run.calls):
            run.go()
            again.go()
        got, want = again.result(), run.result()
        assert got.keys() == want.keys()
        for name, array in want.items():
            same = assert_same_bits if array.dtype.kind != "U" else np.testing.assert_array_equal
            same(got[name], array, f"{resume.GRID[number]} {name}")


@each_way
def test_groups_and_all_that_belongs_to_the_optimizer(way):
    w, b, late = np.ones((3, 4)), np.ones(5, "f4"), {("a", 1): np.ones(7), 2: np.zeros(())}
    low = {("a", 1): np.full(7, -1.0), 2: np.array(-0.5)}
    half = np.empty(5, "f2")
    opt = ac.Adam(
        [{"params": [w], "lr": 0.2, "sum_to_one": "project"}, {"params": b, "copy_to": half, "betas": (ac.schedules.linear(0.5, 9, end=0.9), 0.9)}],
        lr=ac.schedules.plateau(0.3, patience=0), ema_decay=0.9, keep_undo=True, seed=7, n_threads=2, on_nonfinite="skip",
        max_grad_norm=ac.schedules.linear(1.0, 20, end=2.0), norm_over="group", cast=True, zero_grad=True,
    )  # fmt: skip
    opt.step([[np.ones((3, 4))], np.full(5, np.inf, "f4")])
    opt.add_param_group({"params": late, "bounds": (low, None)})

    def grads():  # of which one is cast
        return [[np.arange(12.0).reshape(3, 4)], np.ones(5), {("a", 1): np.ones(7), 2: np.ones(())}]

    for metric in (1.0, 2.0, 3.0):
        opt.step(grads(), metric=metric)
    opt.accumulate(grads())
    again, copies = way((opt, half))
    assert_same(everything(again), everything(opt))
    assert (again.n_threads, again.skipped_steps, again.pending, again.t) == (2, 1, 1, 3)
    assert again.param_groups[1].schedules == opt.param_groups[1].schedules
    with pytest.raises(ValueError, match="no step to undo"):
        again.rollback()
    for one in (opt, again):
        one.step(metric=4.0)
        one.rollback()
        one.discard()
        one.param_groups[2]["bounds"] = one.param_groups[2]["bounds"]
        one.add_param_group({"params": np.ones(2)})
        one.step([*grads(), np.ones(2)], metric=5.0)
    assert_same(everything(again), everything(opt))
    assert_same_bits(copies, half)
    assert again.param_groups[3].schedules == opt.param_groups[3].schedules  # the constructor's


@each_way
def test_a_subclass_keeps_what_is_its_own(way):
    model = Model(Mine).fit(2)
    again = way(model).fit(1)
    assert type(again.opt) is Mine
    assert again.opt._history == [1, 2, 3]
    assert model.opt._history == [1, 2]


def test_another_process_with_other_threads(tmp_path):
    model = Model(lr=0.1, n_threads=None)
    model.w = np.ones((300, 300), "float32")
    model.opt = ac.AdamW({"w": model.w, "b": model.b}, lr=0.1, state_dtype="uint8")
    model.fit()
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    child(f"""
import pickle
import adaptive_c as ac
ac.set_num_threads(3)
model = pickle.load(open({str(tmp_path / "model")!r}, "rb"))
model.fit()
pickle.dump(model, open({str(tmp_path / "again")!r}, "wb"))
""", PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]))  # fmt: skip
    again = pickle.loads((tmp_path / "again").read_bytes())
    model.fit()
    assert_same_bits(again.w, model.w)
    assert_same(everything(again.opt), everything(model.opt))


@each_way
def test_after_other_arrays_have_taken_the_place_of_the_parameters(way):
    """The copy is over those, and can be given others before anything else is done with it."""
    model = Model(lr=0.1).fit()
    model.w, model.b = model.w.copy(), model.b.copy()
    model.opt.rebind({"w": model.w, "b": model.b})
    again, third = way(model), way(model)
    third.w = third.w.copy()
    third.opt.rebind({"w": third.w, "b": third.b})
    model.fit()
    for one in (again, third):
        assert one.opt.param_groups[0]["params"]["w"] is one.w
        assert_same_bits(one.fit().w, model.w)
    model.opt.rebind({"w": np.concatenate([model.w, model.w])[:20], "b": model.b})
    with pytest.raises(TypeError, match=r"params\['w'\] is a view"):
        way([model.opt.param_groups[0]["params"]["w"].base, model.opt])


# --- circles, and the first use ----------------------------------------------------------------------------------------


@each_way
def test_a_schedule_may_be_a_method_of_what_holds_the_optimizer(way):
    model = OwnSchedule().fit()
    again = way(model)
    assert again.opt.param_groups[0].schedules["lr"].__self__ is again
    assert again.opt.param_groups[0]["lr"] == 0.1 / 4
    assert_same_bits(again.fit().w, model.fit().w)


@each_way
def test_an_array_may_know_its_optimizer(way):
    for first in ("array", "optimizer"):
        w = np.ones(50).view(Knowing).copy()
        w.opt = ac.SGD(w, lr=0.5)
        again = way(w) if first == "array" else way(w.opt).param_groups[0]["params"]
        again.opt.step(np.ones(50))
        assert (np.asarray(again) == 0.5).all()
        assert again.opt.param_groups[0]["params"] is again
        assert (np.asarray(w) == 1).all()


def test_arrays_that_can_not_be_written_matter_at_the_first_use_only():
    """A model that is loaded for predictions may be mapped read-only; the message of a step says what to do."""
    model = Model().fit()
    buffers = []
    text = pickle.dumps(model, 5, buffer_callback=buffers.append)
    again = pickle.loads(text, buffers=[bytes(buffer.raw()) for buffer in buffers])
    assert not again.w.flags.writeable
    assert isinstance(again.opt, ac.AdamW)
    third = pickle.loads(pickle.dumps(copy.deepcopy(again)))  # its arrays can be written
    assert_same_bits(third.fit().w, model.fit().w)
    for _ in range(2):
        with pytest.raises(ValueError, match="read-only") as caught:
            again.fit()
        assert "at its first use" in caught.value.__notes__[-1]
    with pytest.raises(AttributeError, match="'AdamW' object has no attribute 'lr'"):
        _ = again.opt.lr


@each_way
def test_schedules_are_asked_for_the_next_step_alone(way):
    """Not for the first one, nor is that of the constructor which another one has replaced."""
    model = Model(lr=Between(0, 3)).fit(2)
    model.opt.param_groups[0]["lr"] = Between(2, 9)
    model.fit(1)
    assert_same_bits(way(model).fit().w, model.fit().w)


@each_way
def test_a_schedule_that_fails_at_the_first_use(way):
    """Its AttributeError is not taken for one of the optimizer's."""
    again = way(Model(lr=Between(0, 3)).fit(3))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"a schedule raised AttributeError.*nothing for 3"):
            _ = again.opt.t


def test_a_schedule_that_uses_the_optimizer_at_its_first_use_is_refused():
    model = Model(lr=Nested()).fit()
    again = copy.deepcopy(model)
    again.opt.param_groups[0].schedules["lr"].opt = again.opt
    third = copy.deepcopy(again)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="this optimizer is in use"):
            third.fit()


def test_threads_that_use_it_first_at_once():
    """One of them binds it, another one is refused, and none steps arrays that are bound twice."""
    for _ in range(20):
        again = copy.deepcopy(Model(ac.SGD, lr=1.0))
        gate, done = threading.Barrier(4), []

        def work(again=again, gate=gate, done=done):
            gate.wait()
            try:
                again.opt.step({"w": np.ones((20, 30), "f4"), "b": None})
                done.append(1)
            except RuntimeError as error:
                assert "in use" in str(error)  # noqa: PT017

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert again.opt.t == len(done) >= 1
        assert (again.w == 1 - len(done)).all()


# --- refused -----------------------------------------------------------------------------------------------------------


def refused(opt, error, match):
    for make in (copy.deepcopy, pickle.dumps, lambda opt: pickle.dumps([opt], 0)):
        with pytest.raises(error, match=match):
            make(opt)


def test_a_view_is_refused_with_the_remedy(tmp_path):
    whole, buffer = np.zeros(10), bytearray(80)
    mapped = np.memmap(tmp_path / "w", "f8", "w+", shape=(10,))
    views = {
        "view": whole[:5],
        "memmap": mapped,
        "map": np.frombuffer(mmap.mmap(-1, 80)),
        "buffer": np.frombuffer(buffer),
    }
    for view in views.values():
        refused(
            ac.SGD(view), TypeError, r"can't be pickled or copied: params is a view.*np\.array\(x\).*opt\.save\(path\)"
        )
        refused(ac.SGD([np.zeros(3), view]), TypeError, r"params\[1\] is a view")
        refused(ac.SGD({"a": np.zeros(3), "b": view}), TypeError, r"params\['b'\] is a view")
        refused(
            ac.SGD([{"params": np.zeros(3)}, {"params": [view]}]), TypeError, r"params\[1\]\['params'\]\[0\] is a view"
        )
    halves = np.zeros((2, 3), "f4")
    refused(ac.SGD([{"params": np.zeros(3)}, {"params": np.zeros(3), "copy_to": halves[1]}]), TypeError,
            r"params\[1\]\['copy_to'\] is a view")  # fmt: skip
    opt = ac.SGD(mapped, lr=1.0)
    opt.step(np.ones(10))
    opt.save(tmp_path / "run")  # the remedy
    again = ac.SGD(np.zeros(10))
    again.load(tmp_path / "run")
    assert again.t == 1


def test_a_view_of_what_nothing_else_has_is_none():
    """Unpickled arrays and reshaped ones don't own their memory, but nothing else does."""
    for w in (np.arange(12.0).reshape(3, 4), np.frombuffer(bytearray(80)), np.ndarray(10, buffer=bytearray(80))):
        assert w.base is not None
        opt = copy.deepcopy(ac.SGD(w))
        assert_same_bits(opt.param_groups[0]["params"], w)
    opt = ac.SGD(np.ones(1000), lr=0.5)
    for protocol in (4, 5, 2, 5):
        opt = pickle.loads(pickle.dumps(opt, protocol))
        opt.step(np.ones(1000))
    assert (opt.param_groups[0]["params"] == -1).all()


def test_rows_that_have_missed_steps_are_refused_until_they_are_caught_up():
    """The arrays may have been pickled before the optimizer is asked."""
    table = np.ones((30, 4), "f4")
    opt = ac.AdamW(table, lr=0.1, rows="exact")
    for i in range(3):
        opt.step(ac.Rows(np.array([i]), np.ones((1, 4), "f4")))
    before = table.copy()
    refused(opt, ValueError, r"rows of this optimizer have missed steps.*opt\.catch_up\(\)")
    assert_same_bits(table, before)
    opt.catch_up()
    again, copied = copy.deepcopy((opt, table))
    for one in (opt, again):
        one.step(ac.Rows(np.array([7]), np.ones((1, 4), "f4")))
        one.catch_up()
    assert_same_bits(table, copied)
    opt.accumulate(ac.Rows(np.array([7]), np.ones((1, 4), "f4")))
    refused(opt, ValueError, r"accumulated rows are pending.*discard\(\)")


def test_in_the_middle_of_something_it_is_refused():
    model = Model(ema_decay=0.9).fit()
    with model.opt.averaged_parameters():
        refused(model.opt, RuntimeError, "averaged_parameters")
    with model.opt.stepping() as now:
        now("b", model.b + 1)
        refused(model.opt, RuntimeError, "stepping")
    schedule = Watching()
    model = Model(lr=schedule)
    schedule.opt = model.opt
    with pytest.raises(RuntimeError, match="in use"):
        model.fit()
    assert model.opt.t == 0


def test_a_copy_that_would_step_the_same_arrays_is_refused():
    opt = ac.SGD(np.zeros(3))
    for one in (opt, copy.deepcopy(opt)):
        with pytest.raises(TypeError, match=r"both would step the same arrays; copy\.deepcopy"):
            copy.copy(one)


def test_a_function_of_your_own_goes_as_pickle_lets_it():
    model = Model(lr=lambda t: 0.1 / (1 + t), max_grad_norm=lambda t: 1.0 + t, norm_over="array").fit()
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(model)
    assert_same_bits(copy.deepcopy(model).fit().w, model.fit().w)


# --- hosts -------------------------------------------------------------------------------------------------------------


def test_a_fitted_network_of_scikit_learn_goes_on_learning():
    neural = pytest.importorskip("sklearn.neural_network")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 6)), rng.normal(size=200)
    model = neural.MLPRegressor(hidden_layer_sizes=(16, 8), random_state=0, batch_size=50).partial_fit(x, y)
    model._optimizer = hosts.ForScikitLearn(model.coefs_ + model.intercepts_, lr=1e-2)
    model.partial_fit(x, y)
    for way in WAYS:
        again, before = way(model), [w.copy() for w in model.coefs_]
        want = copy.deepcopy(model)
        for _ in range(3):
            again.partial_fit(x, y)
            want.partial_fit(x, y)
        assert again.loss_ < model.loss_
        for w, v, old in zip(again.coefs_, want.coefs_, before, strict=True):
            assert_same_bits(w, v)
            assert (w != old).any()
        assert_same([w.copy() for w in model.coefs_], before)


@pytest.mark.parametrize(("compress", "mmap_mode"), [(0, None), (3, None), (0, "c")])
def test_what_joblib_has_torn_is_not_used_until_it_is_joined(tmp_path, compress, mmap_mode):
    """joblib writes an array anew wherever it meets it, so the model has other arrays than its optimizer."""
    joblib = pytest.importorskip("joblib")
    model = Model(lr=0.1, ema_decay=0.9, max_grad_norm=ac.schedules.linear(10.0, 9, end=1.0)).fit()
    joblib.dump(model, tmp_path / "model", compress=compress)
    again = joblib.load(tmp_path / "model", mmap_mode=mmap_mode)
    assert_same_bits(again.w, model.w)  # which is what predictions need
    for one in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        for use in (Model.fit, lambda one: one.opt.t):
            with pytest.raises(RuntimeError, match=r"Call opt.rebind\(arrays\)"):
                use(one)
            with pytest.raises(ValueError, match="must be a dict with the keys 'w', 'b'"):
                one.opt.rebind({"w": one.w})  # which joins nothing
    again.opt.rebind({"w": again.w, "b": again.b})
    assert type(again.opt) is ac.AdamW
    assert again.opt.param_groups[0]["params"]["w"] is again.w
    model.fit()
    assert_same_bits(again.fit().w, model.w)
    assert_same(everything(again.opt), everything(model.opt))


def test_a_model_that_joins_its_optimizer_when_it_is_loaded(tmp_path):
    joblib = pytest.importorskip("joblib")
    model = Rejoined(lr=0.1).fit()
    joblib.dump(model, tmp_path / "model")
    again = joblib.load(tmp_path / "model")
    model.fit()
    for one in (again, *(way(model) for way in WAYS)):
        assert_same_bits((one.fit() if one is again else one).w, model.w)


def test_copies_that_joblib_has_torn_cannot_be_joined(tmp_path):
    joblib = pytest.importorskip("joblib")
    w, half = np.ones(3, "float32"), np.ones(3, "float16")
    joblib.dump({"w": w, "half": half, "opt": ac.SGD(w, lr=0.5, copy_to=half)}, tmp_path / "model")
    again = joblib.load(tmp_path / "model")
    with pytest.raises(ValueError, match=r"rebind can't join the arrays of copy_to.*store the model by pickle"):
        again["opt"].rebind(again["w"])
