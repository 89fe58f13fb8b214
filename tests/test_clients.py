"""adaptive_c.torch under Hugging Face's Trainer, accelerate and Lightning: curves as torch's, and resumed to the bit.

Models are tiny and random, data are random numbers, and nothing is downloaded.  `pip install '.[clients]'` brings the packages.
"""

import copy
import itertools
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", minversion="2.13")
import adaptive_c.torch as door  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs" / "torch.md"
MISSING = "{} is missing: pip install 'adaptive_c[clients]'"
pytestmark = [
    pytest.mark.later("torch"),
    pytest.mark.filterwarnings("ignore:.*(LeafSpec|treespec):FutureWarning"),  # Lightning imports torch's old name
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # Lightning's advice: none are wanted here
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # Lightning's: each run here has a folder of its own
    pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary"),  # Lightning's
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other take longer than all of these tensors do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def hugging_face():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
            patch.setenv(name, "1")
        pytest.importorskip("accelerate", reason=MISSING.format("accelerate"))
        yield pytest.importorskip("transformers", reason=MISSING.format("transformers"))


@pytest.fixture(scope="module")
def lightning():
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and not mpi.Is_initialized():  # another test has imported it only; Lightning asks it for ranks
        mpi.Init()
    return pytest.importorskip("lightning", reason=MISSING.format("lightning"))


def same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert torch.equal(x, theirs[name]), name


def close(ours, theirs, part):
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        np.testing.assert_allclose(x.detach(), theirs[name].detach(), rtol=part, atol=part * 1e-2, err_msg=name)


# --- Hugging Face's Trainer ------------------------------------------------------------------------------------------------

STEPS, ACCUMULATED, SAVED = 12, 2, 6


@pytest.fixture
def gpt(hugging_face, tmp_path):
    """Trains a GPT-2 of 7,000 numbers, with tied embeddings and dropout, on random tokens."""
    tokens = torch.randint(13, (40, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in tokens]

    def train(cls, options, dtype=torch.float32, seed=0, own_scheduler=False, resume=None, **arguments):
        torch.manual_seed(seed)
        sizes = {"vocab_size": 13, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
        config = hugging_face.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
        model = hugging_face.GPT2LMHeadModel(config).to(dtype)
        losses = []
        model.register_forward_hook(lambda module, given, found: losses.append(found.loss.item()))
        given = hugging_face.TrainingArguments(
            **{"output_dir": str(tmp_path / cls.__module__), "use_cpu": True, "report_to": "none", "disable_tqdm": True,
               "seed": 3, "max_steps": STEPS, "per_device_train_batch_size": 4, "max_grad_norm": 0.5, "warmup_steps": 3,
               "gradient_accumulation_steps": ACCUMULATED, "weight_decay": 0.1, "lr_scheduler_type": "cosine",
               "logging_steps": 1, "save_strategy": "no", **arguments}
        )  # fmt: skip
        if own_scheduler:
            optimizer = cls(model.parameters(), **options)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2 * options["lr"], total_steps=STEPS)
            how = {"optimizers": (optimizer, scheduler)}
        else:  # the Trainer makes two groups, with and without weight decay, and a scheduler
            how = {"optimizer_cls_and_kwargs": (cls, dict(options))}
        trainer = hugging_face.Trainer(model, given, train_dataset=data, **how)
        trainer.train(resume_from_checkpoint=resume)
        return SimpleNamespace(
            losses=losses,  # of each micro-batch
            parameters=dict(model.named_parameters()),
            optimizer=trainer.optimizer.optimizer,
            norms=[entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
            saved=f"{given.output_dir}/checkpoint-{SAVED}",
        )

    return train


@pytest.mark.parametrize(
    ("name", "options", "own_scheduler"),
    [("AdamW", {"lr": 0.02}, False), ("RMSprop", {"lr": 0.002, "momentum": 0.9, "centered": True}, True)],
    ids=["groups of the Trainer", "optimizers="],
)
def test_trainer(gpt, name, options, own_scheduler):
    """The loss is formed in float32: one unit of its last place.  The parameters are float64."""
    ours, theirs = (
        gpt(getattr(module, name), options, torch.float64, own_scheduler=own_scheduler)
        for module in (door, torch.optim)
    )
    assert len(ours.losses) == STEPS * ACCUMULATED
    assert ours.losses == pytest.approx(theirs.losses, rel=2**-23, abs=0)
    close(ours.parameters, theirs.parameters, 1e-7)
    assert min(ours.norms) < 0.5 < max(ours.norms)  # some steps are clipped, others are not
    assert ours.optimizer.t == STEPS
    assert [group["weight_decay"] for group in ours.optimizer.param_groups] == (
        [theirs.optimizer.defaults["weight_decay"]] if own_scheduler else [0.1, 0.0]
    )


@pytest.mark.parametrize(("bf16", "part"), [(False, 1e-5), (True, 2**-9)], ids=["float32", "bf16=True"])
def test_trainer_in_single_and_mixed_precision(gpt, bf16, part):
    """Adam's first steps are signs, also of gradients that are rounding errors, as a key's bias has them."""
    ours, theirs = (gpt(module.AdamW, {"lr": 0.02}, bf16=bf16) for module in (door, torch.optim))
    assert ours.losses == pytest.approx(theirs.losses, rel=part, abs=0)


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [
        ("AdamW", {}, "float32"),
        ("NAdam", {"state_dtype": "uint8", "ema_decay": 0.9, "max_grad_norm": 0.4}, "float32"),
        ("AdamW", {"master": "float32", "state_dtype": "bfloat16"}, "bfloat16"),
        ("Lion", {"rounding": "stochastic"}, "bfloat16"),
    ],
    ids=["AdamW", "narrow state and an average", "float32 master of bfloat16", "stochastic rounding"],
)
def test_trainer_resumes_to_the_bit(gpt, name, options, dtype):
    cls, options = getattr(door, name), {"lr": 0.01, **options}
    whole = gpt(cls, options, getattr(torch, dtype), save_strategy="steps", save_steps=SAVED)
    again = gpt(cls, options, getattr(torch, dtype), save_steps=SAVED, seed=9, resume=whole.saved)
    assert again.losses == whole.losses[SAVED * ACCUMULATED :]
    same_bits(again.parameters, whole.parameters)
    assert again.optimizer.t == whole.optimizer.t == STEPS
    ours, theirs = again.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for number, state in ours.items():
        same_bits(state, theirs[number])


@pytest.mark.parametrize(("first", "then"), [(torch.optim, door), (door, torch.optim)], ids=["from torch", "to torch"])
def test_trainer_resumes_a_checkpoint_of_the_other(gpt, first, then):
    options = {"lr": 0.02}
    whole = gpt(torch.optim.AdamW, options, torch.float64)
    saved = gpt(first.AdamW, options, torch.float64, save_strategy="steps", save_steps=SAVED).saved
    again = gpt(then.AdamW, options, torch.float64, save_steps=SAVED, seed=9, resume=saved)
    assert again.losses == pytest.approx(whole.losses[SAVED * ACCUMULATED :], rel=2**-23, abs=0)
    close(again.parameters, whole.parameters, 1e-7)


# --- accelerate ------------------------------------------------------------------------------------------------------------

X = torch.randn(48, 5, generator=torch.Generator().manual_seed(2))
Y = X.sin().sum(1, keepdim=True)


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def loader():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=6)


@pytest.fixture
def accelerate(hugging_face):
    import accelerate

    yield accelerate
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate(accelerate, tmp_path):
    """A loop with accumulation, clipping and a scheduler, stopped after each of its two epochs."""

    def train(module, seed=0, epochs=2, resume=None, folder=None):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = network(seed)
        optimizer = module.AdamW(model.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        model, optimizer, scheduler, data = accelerator.prepare(model, optimizer, scheduler, loader())
        if resume:
            accelerator.load_state(resume)
        losses = []
        for _ in range(epochs):
            for x, y in data:
                with accelerator.accumulate(model):
                    loss = torch.nn.functional.mse_loss(model(x), y)
                    losses.append(loss.item())
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
        if folder:
            accelerator.save_state(folder)
        return losses, dict(model.named_parameters())

    (losses, parameters), (theirs, _) = train(door), train(torch.optim)
    assert losses == pytest.approx(theirs, rel=1e-5, abs=0)
    assert losses[-1] < 0.8 * losses[0]
    train(door, epochs=1, folder=tmp_path)
    again, resumed = train(door, epochs=1, resume=tmp_path, seed=9)
    assert again == losses[len(losses) // 2 :]
    same_bits(resumed, parameters)


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["unscaled before", "unscaled in the step"])
def test_accelerates_wrapper_with_a_scaler_and_other_parameters(accelerate, options):
    """It loads the state of a new optimizer into itself, assigns another `step`, and may exchange parameters."""
    accelerate.Accelerator(cpu=True)

    def train(module):
        model = network()
        inner = module.AdamW(model.parameters(), lr=0.02, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        optimizer = accelerate.optimizer.AcceleratedOptimizer(inner, device_placement=True, scaler=scaler)
        losses, skipped = [], []
        for t, (x, y) in enumerate(loader()):
            if t in (0, 5):  # before the first step, and between two
                before, model = model, copy.deepcopy(model)
                optimizer._switch_parameters(dict(zip(before.parameters(), model.parameters(), strict=True)))
            loss = torch.nn.functional.mse_loss(model(x), y)
            losses.append(loss.item())
            scaler.scale(loss).backward()
            if t == 3:
                model[0].bias.grad[0] = float("inf")
            optimizer.step()
            optimizer.zero_grad()
            skipped.append(optimizer.step_was_skipped)
        return losses, skipped, scaler.get_scale(), inner

    (losses, *ours, inner), (theirs, *same, _) = train(door), train(torch.optim)
    assert losses == pytest.approx(theirs, rel=1e-5, abs=0)
    assert ours == same
    assert inner.t == len(losses) - 1


# --- Lightning -------------------------------------------------------------------------------------------------------------

EPOCHS = 3


@pytest.fixture
def fit(lightning, tmp_path):
    """Trains the network by Lightning's Trainer, 8 batches an epoch."""

    class Module(lightning.LightningModule):
        def __init__(self, make, seed, manual, kind):
            super().__init__()
            self.network, self.make, self.losses = network(seed).to(kind), make, []
            self.automatic_optimization = not manual

        def training_step(self, batch, number):
            x, y = (each.to(self.network[0].weight.dtype) for each in batch)
            loss = torch.nn.functional.mse_loss(self.network(x), y)
            self.losses.append(loss.item())
            if not self.automatic_optimization:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                self.lr_schedulers().step()
                self.seen = optimizer.t, optimizer.grad_norm
            return loss

        def configure_optimizers(self):
            optimizer = self.make(self.network.parameters())
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    numbers = itertools.count()

    def run(make, seed=0, manual=False, kind=torch.float32, resume=None, **arguments):
        module, folder = Module(make, seed, manual, kind), tmp_path / str(next(numbers))
        every = lightning.pytorch.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        trainer = lightning.Trainer(
            **{"accelerator": "cpu", "max_epochs": EPOCHS, "logger": False, "callbacks": [every],
               "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path, **arguments}
        )  # fmt: skip
        trainer.fit(module, loader(), ckpt_path=resume)
        return SimpleNamespace(
            losses=module.losses, parameters=dict(module.named_parameters()), module=module, trainer=trainer,
            optimizer=trainer.optimizers[0], saved=folder / "epoch=0.ckpt",
        )  # fmt: skip

    return run


def adamw(module, **options):
    return lambda params: module.AdamW(params, lr=0.02, **options)


@pytest.mark.parametrize(
    ("name", "options"), [("AdamW", {"lr": 0.02}), ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True})]
)
def test_lightning(fit, name, options):
    """In float64: a few roundings, grown in 12 steps."""
    how = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "kind": torch.float64}
    ours, theirs = (fit(lambda p, m=m: getattr(m, name)(p, **options), **how) for m in (door, torch.optim))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-10, abs=0)
    close(ours.parameters, theirs.parameters, 1e-9)
    assert ours.optimizer.t == EPOCHS * 4
    assert ours.losses[-1] < 0.8 * ours.losses[0]


@pytest.mark.parametrize(
    "options", [{}, {"state_dtype": "uint8", "ema_decay": 0.9, "max_grad_norm": 0.5}], ids=["plain", "narrow"]
)
def test_lightning_resumes_to_the_bit(fit, options):
    whole = fit(adamw(door, **options), accumulate_grad_batches=2)
    again = fit(adamw(door, **options), accumulate_grad_batches=2, seed=9, resume=whole.saved)
    assert again.losses == whole.losses[8:]
    same_bits(again.parameters, whole.parameters)
    assert again.optimizer.t == whole.optimizer.t == EPOCHS * 4
    ours, theirs = again.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"]
    for number, state in ours.items():
        same_bits(state, theirs[number])


@pytest.mark.parametrize(("first", "then"), [(torch.optim, door), (door, torch.optim)], ids=["from torch", "to torch"])
def test_lightning_resumes_a_checkpoint_of_the_other(fit, first, then):
    whole = fit(adamw(torch.optim), kind=torch.float64)
    saved = fit(adamw(first), kind=torch.float64, max_epochs=1).saved
    again = fit(adamw(then), kind=torch.float64, seed=9, resume=saved)
    assert again.losses == pytest.approx(whole.losses[8:], rel=1e-10, abs=0)


def test_lightnings_manual_optimization(fit):
    """The optimizer that a module sees there is Lightning's wrapper."""
    ours, theirs = fit(adamw(door, max_grad_norm=1e9), manual=True), fit(adamw(torch.optim), max_epochs=1)
    assert ours.losses[:8] == pytest.approx(theirs.losses, rel=1e-5, abs=0)
    assert ours.module.seen == (ours.optimizer.t, ours.optimizer.grad_norm)
    assert ours.optimizer.t == EPOCHS * 8


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightnings_mixed_precision(fit, lightning, precision):
    """With max_grad_norm the optimizer unscales as it steps, and clips: half of the spacing of bfloat16 or float16."""

    def plugins():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9) if precision == "16-mixed" else None
        return [lightning.pytorch.plugins.MixedPrecision(precision, "cpu", scaler)]

    ours = fit(adamw(door, max_grad_norm=0.5), plugins=plugins())
    theirs = fit(adamw(torch.optim), gradient_clip_val=0.5, plugins=plugins())
    assert ours.losses == pytest.approx(theirs.losses, rel=2**-9 if precision == "bf16-mixed" else 2**-12, abs=0)
    again = fit(adamw(door, max_grad_norm=0.5), plugins=plugins(), seed=9, resume=ours.saved)
    assert again.losses == ours.losses[8:]
    changed = fit(adamw(door), gradient_clip_val=0.5, plugins=plugins())  # Lightning unscales and clips, as for torch's
    assert changed.losses == pytest.approx(theirs.losses, rel=2**-9 if precision == "bf16-mixed" else 2**-12, abs=0)


# --- the page --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not PAGE.is_file(), reason="not in a clone")
@pytest.mark.parametrize("client", ["hugging_face", "lightning"])
def test_the_example_of_the_page(client, request, tmp_path, monkeypatch):
    request.getfixturevalue(client)
    monkeypatch.chdir(tmp_path)
    word = {"hugging_face": "Trainer", "lightning": "lightning"}[client]
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (block,) = [block for block in blocks if re.search(f"import.*{word}", block)]
    exec(compile(block, str(PAGE), "exec"), {})
    assert list(Path("run").glob("**/*1[06]*"))  # the last step's checkpoint
