"""AdaLoRA in other training loops: Lightning, accelerate, DDP."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.utils.data import DataLoader, TensorDataset

import tunerkit
from plugins.adalora.tests import short_training
from plugins.adalora.tests.short_training import TOTAL, adamw, attached, everything, layers, live, same
from tests.support import spawned
from tests.support.model_checks import told
from tests.support.toys import group_of_one as group_of_one
from tunerkit_testing.small import train

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(2))
# Before pruning, during it, and after memory has shrunk.
AT = (3, 10, 16)


def wrapped(model: nn.Module | None = None, **changes: Any) -> nn.Module:
    return short_training.wrapped(model, **{"exact_svd": True, "shrink": True, **changes})


def batches(size: int) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(X, LABELS), batch_size=size)


@functools.cache
def by_hand() -> nn.Module:
    """The model after ``TOTAL`` steps of a plain loop with batches of 8."""
    model = wrapped()
    optimizer = attached(model, make=torch.optim.AdamW)
    for number in range(TOTAL):
        rows = slice(8 * (number % 8), 8 * (number % 8) + 8)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[rows]), LABELS[rows]).backward()
        optimizer.step()
    return model


def assert_trained_as_by_hand(model: nn.Module) -> None:
    """Check that the budget is exact, and that ranks and outputs are those of the plain loop."""
    tuner, expected = tunerkit.tuner(model), by_hand()
    assert tuner.steps == tuner.total_steps == TOTAL
    assert [change.step for change in tuner.history] == [6, 9, 12, 14]
    assert live(model) == tuner.budget() == 6
    assert tuner.ranks() == tunerkit.tuner(expected).ranks()
    with torch.no_grad():
        assert torch.allclose(model(X), expected(X), rtol=1e-4, atol=1e-5)


def lightning_module() -> Any:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = wrapped()

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = adamw(self)
            tunerkit.attach(self, optimizer, total_steps=int(self.trainer.estimated_stepping_batches))
            return optimizer

    return Module()


def lightning_trainer(folder: Path, **options: Any) -> Any:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    return lightning.Trainer(
        max_steps=TOTAL, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(folder), **options,
    )  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore")  # Lightning's own advice on workers and logging
def test_lightning_trains_to_the_budget(accumulate: int, tmp_path: Path) -> None:
    """One line in configure_optimizers; Lightning's optimizer steps count, not its micro-batches."""
    module = lightning_module()
    trainer = lightning_trainer(tmp_path, accumulate_grad_batches=accumulate, enable_checkpointing=False)
    trainer.fit(module, batches(8 // accumulate))
    assert_trained_as_by_hand(module.eval().net)


@pytest.mark.filterwarnings("ignore")  # Lightning's own advice on workers and logging
def test_lightning_resumes_exactly_from_its_checkpoint(tmp_path: Path) -> None:
    """`fit(..., ckpt_path=...)`: averages, masks, steps and history equal those of the uninterrupted run.

    One batch is an epoch here: Lightning does not resume in the middle of an epoch by itself.
    """
    whole = lightning_module()
    callbacks = pytest.importorskip("lightning").pytorch.callbacks
    keeper = callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    lightning_trainer(tmp_path, callbacks=[keeper]).fit(whole, batches(64))
    for at in AT:
        part = lightning_module()
        trainer = lightning_trainer(tmp_path, enable_checkpointing=False)
        trainer.fit(part, batches(64), ckpt_path=str(tmp_path / f"step={at}.ckpt"))
        assert same(everything(part), everything(whole))
    assert tunerkit.tuner(whole).steps == TOTAL


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_trains_to_the_budget_and_resumes_exactly(accumulate: int, tmp_path: Path) -> None:
    """The prepared optimizer is attached; steps that accelerate skips while accumulating are not counted.

    Its `save_state` and `load_state` include the training state, in the optimizer's state.
    """
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    size, ends = 8 // accumulate, []
    for begin in (0, *AT):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        plain = wrapped()
        model, optimizer = accelerator.prepare(plain, adamw(plain))
        tunerkit.attach(model, optimizer, total_steps=TOTAL)
        if begin:
            accelerator.load_state(tmp_path / str(begin))
        for number in range(accumulate * begin, accumulate * TOTAL):
            if not begin and number in [accumulate * at for at in AT]:
                accelerator.save_state(tmp_path / str(number // accumulate))
            rows = slice(size * number % 64, size * number % 64 + size)
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(X[rows]), LABELS[rows]))
                optimizer.step()
                optimizer.zero_grad()
        ends.append(everything(plain))
    assert_trained_as_by_hand(plain)
    assert all(same(end, ends[0]) for end in ends)


def test_a_reference_keeps_the_ranks_that_the_adapter_had() -> None:
    """A further training prunes and shrinks the adapter; the reference still computes with the earlier triplets."""
    model = wrapped()
    optimizer = attached(model)
    train(model, optimizer, 5)
    before, reference = model(X).detach(), tunerkit.reference(model)
    for _ in range(5, TOTAL):
        assert torch.equal(reference(X), before)
        train(model, optimizer, 1)
    assert live(model) == 6
    assert not torch.equal(model(X), before)


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("rebuilds", [True, False])
def test_adapters_shrink_under_ddp_that_can_be_rebuilt(rebuilds: bool) -> None:
    """Where it cannot be, since it has a communication hook of somebody's own, masks stay, which a warning says."""

    def my_hook(state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model = wrapped()
    parallel = nn.parallel.DistributedDataParallel(model)
    if not rebuilds:
        parallel.register_comm_hook(None, my_hook)
    optimizer = attached(parallel)
    texts = [text for text in told(lambda: train(parallel, optimizer, TOTAL)) if "stay in memory, still masked" in text]
    assert ["my_hook, which may know its buckets" in text for text in texts] == [True] * (not rebuilds)
    assert [len(each.lam) for each in layers(model)] == [each.rank if rebuilds else 4 for each in layers(model)]
    kept = [(state["exp_avg"].shape, p.shape) for p, state in optimizer.state.items() if "exp_avg" in state]
    assert kept
    assert all(moment == own for moment, own in kept)


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("gamma", [0.0, 0.5], ids=["plain", "regulariser"])
def test_adapters_that_are_sharded_after_attach_are_refused_before_a_step(gamma: float) -> None:
    """With fully_shard each process has a part of every triplet: scores would be of parts. Before attach it is fine."""
    fsdp = pytest.importorskip("torch.distributed.fsdp", reason="this torch has no FSDP")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for late in (False, True):
        model = wrapped(nn.Sequential(nn.Linear(6, 8)), targets=["0"], gamma=gamma, exact_svd=None)
        shard = functools.partial(fsdp.fully_shard, model, mesh=mesh)
        if not late:
            shard()
        optimizer = attached(model)
        if late:
            shard()
        model(X[:4]).sum().backward()
        if late:
            with pytest.raises(
                tunerkit.errors.StepError, match=r"'default' became DTensors .*attach after fully_shard"
            ):
                optimizer.step()
        else:
            optimizer.step()
        assert tunerkit.tuner(model).steps == (not late)


def test_a_spawned_worker_trains_the_model_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-trained wrapped model is sent to a new interpreter, which trains it for two steps and returns it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = wrapped()
    train(model, attached(model, make=torch.optim.SGD), 3)
    assert tunerkit.tuner(model).steps == 3
    spawned.check_trains_in_a_worker(model)
