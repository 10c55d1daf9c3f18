"""AdaLoRA in other training loops: Lightning, accelerate, DDP."""

import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.utils.data import DataLoader, TensorDataset

import tunerkit
from plugins.adalora.tests import short_training
from plugins.adalora.tests.short_training import TOTAL, adamw
from tests.support import spawned, two_processes
from tunerkit import injection
from tunerkit_testing.small import train, trainable

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(2))
SETTINGS = {**short_training.SETTINGS, "exact_svd": True, "shrink": True}


def wrapped() -> nn.Module:
    return short_training.wrapped(**SETTINGS)


# Before pruning, during it, and after memory has shrunk.
AT = (3, 10, 16)


def batches(size: int) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(X, LABELS), batch_size=size)


def by_hand(size: int) -> nn.Module:
    """The model after ``TOTAL`` steps of a plain loop with batches of ``size``."""
    model = wrapped()
    optimizer = adamw(model)
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    while tunerkit.tuner(model).steps < TOTAL:
        for x, labels in batches(size):
            if tunerkit.tuner(model).steps < TOTAL:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), labels).backward()
                optimizer.step()
    return model


def assert_trained_as_by_hand(model: nn.Module, size: int) -> None:
    """Check that the budget is exact, and that ranks and outputs are those of the plain loop."""
    tuner, expected = tunerkit.tuner(model), by_hand(size)
    assert tuner.steps == tuner.total_steps == TOTAL
    assert [change.step for change in tuner.history] == [6, 9, 12, 14]
    assert sum(tuner.ranks().values()) == tuner.budget() == 6
    assert tuner.ranks() == tunerkit.tuner(expected).ranks()
    with torch.no_grad():
        assert torch.allclose(model(X), expected(X), rtol=1e-4, atol=1e-5)


def assert_same_end(one: nn.Module, other: nn.Module) -> None:
    """Check that both are bit-identical, and that both have been pruned."""
    tuners = tunerkit.tuner(one), tunerkit.tuner(other)
    assert tuners[0].steps == tuners[1].steps == TOTAL
    assert tuners[0].history == tuners[1].history
    assert [change.step for change in tuners[0].history] == [6, 9, 12, 14]
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


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
    assert_trained_as_by_hand(module.eval(), 8)


@pytest.mark.parametrize("at", AT)
@pytest.mark.filterwarnings("ignore")  # Lightning's own advice on workers and logging
def test_lightning_resumes_exactly_from_its_checkpoint(at: int, tmp_path: Path) -> None:
    """`fit(..., ckpt_path=...)`: averages, masks, steps and history equal those of the uninterrupted run.

    One batch is an epoch here: Lightning does not resume in the middle of an epoch by itself.
    """
    whole = lightning_module()
    callbacks = pytest.importorskip("lightning").pytorch.callbacks
    keeper = callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    lightning_trainer(tmp_path, callbacks=[keeper]).fit(whole, batches(64))
    part = lightning_module()
    trainer = lightning_trainer(tmp_path, enable_checkpointing=False)
    trainer.fit(part, batches(64), ckpt_path=str(tmp_path / f"step={at}.ckpt"))
    assert_same_end(part, whole)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_trains_to_the_budget(accumulate: int) -> None:
    """The prepared optimizer is attached; steps that accelerate skips while accumulating are not counted."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    plain = wrapped()
    model, optimizer, loader = accelerator.prepare(plain, adamw(plain), batches(8 // accumulate))
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    while tunerkit.tuner(model).steps < TOTAL:
        for x, labels in loader:
            if tunerkit.tuner(model).steps < TOTAL:
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.cross_entropy(model(x), labels))
                    optimizer.step()
                    optimizer.zero_grad()
    assert_trained_as_by_hand(plain, 8)


@pytest.mark.parametrize("at", AT)
def test_accelerate_resumes_exactly_from_its_checkpoint(at: int, tmp_path: Path) -> None:
    """Accelerate's `save_state` and `load_state` include the training state in the optimizer's state."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    ends = []
    for begin in (0, at):
        accelerator = accelerate.Accelerator(cpu=True)
        plain = wrapped()
        model, optimizer = accelerator.prepare(plain, adamw(plain))
        tunerkit.attach(model, optimizer, total_steps=TOTAL)
        if begin:
            accelerator.load_state(tmp_path / "kept")
        for number in range(begin, TOTAL):
            if number == at and not begin:
                accelerator.save_state(tmp_path / "kept")
            rows = slice(8 * (number % 8), 8 * (number % 8) + 8)
            accelerator.backward(nn.functional.cross_entropy(model(X[rows]), LABELS[rows]))
            optimizer.step()
            optimizer.zero_grad()
        ends.append(plain)
    assert_same_end(ends[1], ends[0])


def test_an_optimizer_s_state_kept_in_memory_is_of_its_moment() -> None:
    """Training continues and changes the averages; loading the stored state restores the old ones."""
    model = wrapped()
    optimizer = adamw(model)
    tunerkit.attach(model, optimizer, total_steps=TOTAL)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), LABELS).backward()
        optimizer.step()

    step()
    kept = optimizer.state_dict()
    before = {name: tensor.clone() for name, tensor in injection.training_state(tunerkit.tuner(model)).tensors.items()}
    step()
    optimizer.load_state_dict(kept)
    after = injection.training_state(tunerkit.tuner(model)).tensors
    assert tunerkit.tuner(model).steps == 1
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_reference_keeps_the_ranks_that_the_adapter_had() -> None:
    """A further training prunes and shrinks the adapter; the reference still computes with the earlier triplets."""
    model = wrapped()
    optimizer = adamw(model)
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    reference: Any = None
    for _ in range(TOTAL):
        if tunerkit.tuner(model).steps == 5:
            with torch.no_grad():
                before = model(X)
            reference = tunerkit.reference(model)
        loss = nn.functional.cross_entropy(model(X), LABELS)
        if reference is not None:
            assert torch.equal(reference(X), before)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(tunerkit.tuner(model).ranks().values()) == 6
    with torch.no_grad():
        assert not torch.equal(model(X), before)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group with this process only."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    address = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1, timeout=timedelta(minutes=20))
    yield
    distributed.destroy_process_group()


def test_ddp_around_a_wrapped_model_trains_to_the_budget(alone: None) -> None:
    """With one process DDP changes nothing; the model can be attached through it."""
    model = wrapped()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = adamw(parallel)
    tunerkit.attach(parallel, optimizer, total_steps=TOTAL)
    while tunerkit.tuner(parallel).steps < TOTAL:
        for x, labels in batches(8):
            if tunerkit.tuner(parallel).steps < TOTAL:
                optimizer.zero_grad()
                nn.functional.cross_entropy(parallel(x), labels).backward()
                optimizer.step()
    assert_trained_as_by_hand(model, 8)


@pytest.mark.parametrize("rebuilds", [True, False])
def test_adapters_shrink_under_ddp_that_can_be_rebuilt(alone: None, rebuilds: bool) -> None:
    """Where it cannot be, since it has a communication hook of somebody's own, masks stay, which a warning says."""

    def my_hook(state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model = wrapped()
    parallel = nn.parallel.DistributedDataParallel(model)
    if not rebuilds:
        parallel.register_comm_hook(None, my_hook)
    optimizer = adamw(parallel)
    tunerkit.attach(parallel, optimizer, total_steps=TOTAL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(TOTAL):
            optimizer.zero_grad()
            nn.functional.cross_entropy(parallel(X), LABELS).backward()
            optimizer.step()
    adapters: list[Any] = list(tunerkit.tuner(model).adapters().values())
    sizes = [len(adapter.lam) for adapter in adapters]
    assert sizes == ([adapter.rank for adapter in adapters] if rebuilds else [4] * len(adapters))
    kept = [(state["exp_avg"].shape, p.shape) for p, state in optimizer.state.items() if "exp_avg" in state]
    assert kept
    assert all(moment == own for moment, own in kept)
    told = [str(each.message) for each in caught if "stay in memory, still masked" in str(each.message)]
    assert len(told) == (0 if rebuilds else 1)
    assert rebuilds or "my_hook, which may know its buckets" in told[0]


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_adapters_that_are_sharded_after_attach_are_refused_before_a_step(alone: None, gamma: float) -> None:
    """With fully_shard each process has a part of every triplet: scores would be of parts. Before attach it is fine."""
    fsdp = pytest.importorskip("torch.distributed.fsdp", reason="this torch has no FSDP")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model, other = (
        tunerkit.wrap(
            nn.Sequential(nn.Linear(6, 8)), "adalora", {**SETTINGS, "targets": ["0"], "gamma": gamma, "exact_svd": None}
        )
        for _ in range(2)
    )
    fsdp.fully_shard(model, mesh=mesh)
    optimizer = adamw(model)
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    model(X[:4]).sum().backward()
    optimizer.step()
    assert tunerkit.tuner(model).steps == 1
    optimizer = adamw(other)
    tunerkit.attach(other, optimizer, total_steps=TOTAL)
    fsdp.fully_shard(other, mesh=mesh)
    other(X[:4]).sum().backward()
    with pytest.raises(tunerkit.errors.StepError, match=r"'default' became DTensors .*attach after fully_shard"):
        optimizer.step()


def test_two_processes_agree_on_masks_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has half of a batch; DDP averages the gradients, so both allocate equally, and like a single process."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = wrapped()
    two_processes.spawn(spawned.train_in_parallel, (model, X[:16], LABELS[:16], TOTAL, str(tmp_path)))
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["ranks"] == other["ranks"]
    assert sum(one["ranks"].values()) == 6
    assert one["steps"] == [6, 9, 12, 14]
    assert one["weights"].keys() == other["weights"].keys()
    assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())
    whole = wrapped()
    optimizer = adamw(whole)
    tunerkit.attach(whole, optimizer, total_steps=TOTAL)
    for _ in range(TOTAL):
        optimizer.zero_grad()
        nn.functional.cross_entropy(whole(X[:16]), LABELS[:16]).backward()
        optimizer.step()
    assert tunerkit.tuner(whole).ranks() == one["ranks"]
    with torch.no_grad():
        assert torch.allclose(whole(X[:16]), one["output"], rtol=1e-3, atol=1e-4)


def test_a_spawned_worker_trains_the_model_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-trained wrapped model is sent to a new interpreter, which trains it for two steps and returns it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = wrapped()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    train(model, optimizer, 3)
    assert tunerkit.tuner(model).steps == 3
    spawned.check_trains_in_a_worker(model)
