"""What peft's AdaLoRA gets wrong on ordinary use: one named test per line, which holds here.

Not here yet: FSDP, DeepSpeed, quantised bases, expert tensors, batches that mix adapters, hot swap, and conversion to
LoRA. Refusals of what is not here are tested beside what refuses.
"""

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit_adalora.svd_layer import SvdLayer
from tunerkit_adalora.training import training_of

pytest.importorskip("transformers", reason="its models and its Trainer are what peft fails with")
pytest.importorskip("accelerate", reason="the Trainer needs it")
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 3, (8,), generator=torch.Generator().manual_seed(2))
TOTAL = 20
# Allocations at 6, 9, 12 and 14, where the ranks are final.
SETTINGS: dict[str, Any] = {"target_rank": 2, "init_rank": 4, "t_init": 4, "t_final": 6, "delta_t": 3}


@pytest.fixture(autouse=True, params=[False, True], ids=["", "svd form"])
def exact_svd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs with and without the SVD re-parametrisation."""
    monkeypatch.setitem(SETTINGS, "exact_svd", request.param)


class Net(nn.Module):
    """Three layers; the output is a tensor, a tuple or a dict."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        logits = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return {"tensor": logits, "tuple": (logits,), "dict": {"out": logits}}[self.form]


def wrapped(model: nn.Module | None = None, **changes: Any) -> nn.Module:
    config = {"targets": ["a", "b", "c"], **SETTINGS, **changes}
    return tunerkit.wrap(Net() if model is None else model, "adalora", config, seed=0)


def attached(model: nn.Module, total_steps: int = TOTAL) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    tunerkit.attach(model, optimizer, total_steps=total_steps)
    return optimizer


def loss_of(model: nn.Module, x: Tensor = X) -> Tensor:
    found = model(x)
    logits = found["out"] if isinstance(found, dict) else found[0] if isinstance(found, tuple) else found
    return nn.functional.cross_entropy(logits, LABELS[: len(logits)])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = TOTAL, x: Tensor = X) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()


def layers(model: nn.Module) -> list[SvdLayer]:
    return [layer for layer in tunerkit.tuner(model).adapters().values() if isinstance(layer, SvdLayer)]


def live(model: nn.Module) -> int:
    return sum(tunerkit.tuner(model).ranks().values())


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    )


def bert_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(0, 31, (4, 6), generator=generator), "labels": torch.tensor([0, 1, 1, 0])}


# --- Silent wrong results -------------------------------------------------------------------------------------------


def test_the_trainer_prunes_without_a_handwritten_callback(tmp_path: Path) -> None:
    """One line attaches; the user calls nothing in a step."""
    model = wrapped(bert(), targets=None)
    batch = bert_batch()
    rows = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    arguments = TrainingArguments(str(tmp_path), max_steps=TOTAL, use_cpu=True, report_to=[], save_strategy="no")
    trainer = Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
    tunerkit.attach(model, trainer)
    trainer.train()
    assert live(model) == 2 * len(tunerkit.tuner(model).targets)


def test_forgetting_to_connect_the_allocator_stops_training_and_is_an_error_at_save(tmp_path: Path) -> None:
    """An error at the second step, and one at save: a whole training never runs silently without pruning."""
    model = wrapped()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(tunerkit.errors.StepError, match=r"is not attached to it: .* tunerkit\.attach"):
        train(model, optimizer, 2)
    with pytest.raises(tunerkit.errors.AdapterError, match=r"tunerkit\.attach"):
        tunerkit.save(model, tmp_path)


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_the_orthogonality_term_acts_whatever_the_model_returns(form: str) -> None:
    """Its gradient is added through the optimizer, so it needs no ``.loss``, no task type and no special output."""
    ends = []
    for gamma in (0.0, 1.0):
        model = wrapped(Net(form), gamma=gamma, start="gaussian", exact_svd=False)
        train(model, attached(model), 3)
        ends.append(layers(model)[0].p.detach().clone())
    assert not torch.equal(*ends)


@pytest.mark.parametrize("micro_batches", [1, 4, 8])
def test_the_loss_is_the_task_s_alone_under_accumulation_evaluation_and_disable(micro_batches: int) -> None:
    """Accumulation does not multiply the regulariser; evaluation and disabled losses equal those of γ = 0."""
    losses = []
    for gamma in (0.0, 0.5):
        model = wrapped(gamma=gamma, exact_svd=False)
        total = 0.0
        for rows in X.chunk(micro_batches):
            loss = loss_of(model, rows) / micro_batches
            loss.backward()
            total += float(loss.detach())
        with tunerkit.disabled(model):
            disabled = float(loss_of(model).detach())
        losses.append((total, float(loss_of(model.eval()).detach()), disabled))
    assert losses[0] == losses[1]


def test_one_overflow_step_does_not_stop_pruning() -> None:
    """GradScaler's default 2**16 overflows once: averages stay finite, and training ends at the target budget."""
    model = wrapped()
    optimizer = attached(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for number in range(TOTAL + 1):
        optimizer.zero_grad()
        scaler.scale(loss_of(model) * (1e38 if number == 2 else 1.0)).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        training = training_of(tunerkit.tuner(model))
        assert all(bool(t.isfinite().all()) for t in itertools.chain(*training.averages))
    assert live(model) == 6


def test_fp16_adapters_are_not_pruned_away() -> None:
    """Scores whose products fp16 cannot represent are fp32: the budget is met, not 0."""
    model = wrapped(adapter_dtype="float16")
    tunerkit.attach(model, optimizer := torch.optim.SGD(tunerkit.tuner(model).parameters(), lr=1e-3), total_steps=TOTAL)
    for _ in range(TOTAL):
        for parameter in tunerkit.tuner(model).parameters():
            parameter.grad = torch.full_like(parameter, 1e-6)
        optimizer.step()
    assert live(model) == 6


def test_ties_do_not_prune_more_than_the_budget_says() -> None:
    """With equal scores, exactly the budget stays."""
    model = wrapped()
    with torch.no_grad():
        for parameter in tunerkit.tuner(model).parameters():
            parameter.fill_(0.5)
    optimizer = torch.optim.SGD(tunerkit.tuner(model).parameters(), lr=0.0)
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    for _ in range(TOTAL):
        for parameter in tunerkit.tuner(model).parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert live(model) == 6


@pytest.mark.parametrize("step", [7, 8, 10, 15])
def test_between_two_masks_the_file_is_the_live_model(step: int, tmp_path: Path) -> None:
    """The current λ is saved: the loaded model computes the same as the live one."""
    model = wrapped()
    train(model, attached(model), step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tunerkit.TunerkitWarning)
        path = tunerkit.save(model, tmp_path)
    assert torch.equal(tunerkit.load(Net(), path)(X), model(X))


@pytest.mark.parametrize("shrink", [True, False])
def test_dead_ranks_do_not_revive_when_stepping_stops_in_the_final_phase(shrink: bool) -> None:
    """From the last allocation on, dead triplets stay dead, after each step and after the last one."""
    model = wrapped(shrink=shrink)
    optimizer = attached(model)
    train(model, optimizer, 16)
    ranks = tunerkit.tuner(model).ranks()
    for layer in layers(model):
        assert not layer.lam[~layer.mask].any()
    tunerkit.steps.detach(tunerkit.tuner(model))
    assert tunerkit.tuner(model).ranks() == ranks
    assert live(model) == 6


@pytest.mark.parametrize("name", ["alpha_pattern", "use_rslora", "init_lora_weights", "rank_pattern"])
def test_settings_that_do_nothing_are_refused(name: str) -> None:
    """No key is accepted and then ignored."""
    with pytest.raises(tunerkit.errors.ConfigError, match=f"unknown key '{name}'"):
        tunerkit.wrap(Net(), "adalora", {**SETTINGS, name: "pissa"})


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_convolutions_of_every_padding_mode_equal_their_merged_weight(mode: Any) -> None:
    """The adapter's input has the padding of the base layer."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.Flatten(), nn.Linear(64, 3))
    model = tunerkit.wrap(base, "adalora", {**SETTINGS, "targets": ["0"]}, seed=0)
    x = torch.randn(8, 3, 4, 4)
    train(model, attached(model), x=x)
    adapted = model(x).detach()
    tunerkit.merge(model)
    assert (model(x) - adapted).abs().max() <= 1e-5 * adapted.abs().max()


def test_no_mask_changes_under_merged_weights_and_unmerging_is_exact() -> None:
    """A step while merged is an error, so nothing changes in between: unmerge restores everything bit for bit."""
    model = wrapped()
    optimizer = attached(model)
    train(model, optimizer, 13)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tunerkit.merge(model)
    with pytest.raises(tunerkit.errors.StepError, match="merged"):
        optimizer.step()
    with pytest.raises(tunerkit.errors.StepError, match="merged"):
        tunerkit.tuner(model).finish()
    tunerkit.unmerge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- Crashes on ordinary use ----------------------------------------------------------------------------------------


def test_a_loaded_adapter_takes_labels(tmp_path: Path) -> None:
    """Loss and backward work in a model with a loaded adapter, for inference and for training."""
    model = wrapped(bert(), targets=None)
    optimizer = attached(model)
    for _ in range(TOTAL):
        optimizer.zero_grad()
        model(**bert_batch()).loss.backward()
        optimizer.step()
    path = tunerkit.save(model, tmp_path)
    loaded = tunerkit.load(bert(), path).eval()
    assert torch.equal(loaded(**bert_batch()).loss, model.eval()(**bert_batch()).loss)
    trainable = tunerkit.load(bert(), path, trainable=True)
    trainable(**bert_batch()).loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in tunerkit.tuner(trainable).parameters())


@pytest.mark.parametrize("at", [7, 13, 16], ids=["after the first prune", "before the last", "shrunk"])
def test_training_resumes_after_pruning(at: int, tmp_path: Path) -> None:
    """Save, load, attach, restore the state: the end is bit-identical. The Trainer is in test_resuming.py."""
    whole = wrapped()
    optimizer = attached(whole)
    train(whole, optimizer, at)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tunerkit.TunerkitWarning)
        path = tunerkit.save(whole, tmp_path)
    tunerkit.save_state(whole, tmp_path)
    part = tunerkit.load(Net(), path, trainable=True)
    again = attached(part)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else both would move the same moments
    tunerkit.load_state(part, tmp_path)
    train(whole, optimizer, TOTAL - at)
    train(part, again, TOTAL - at)
    assert torch.equal(part(X), whole(X))
    assert tunerkit.tuner(part).ranks() == tunerkit.tuner(whole).ranks()


@pytest.mark.parametrize("options", [{}, {"save_total_limit": 1}])
def test_the_best_model_is_loaded_at_the_end_after_pruning(options: dict[str, Any], tmp_path: Path) -> None:
    """The best step has other ranks than the last: no size mismatch, and the model has its ranks."""
    model = wrapped(bert(), targets=None)
    batch = bert_batch()
    rows = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    made: list[Trainer] = []
    arguments = TrainingArguments(
        str(tmp_path), max_steps=TOTAL, use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no",
        save_strategy="steps", save_steps=5, eval_strategy="steps", eval_steps=5, load_best_model_at_end=True,
        metric_for_best_model="early", greater_is_better=True, **options,
    )  # fmt: skip
    made.append(
        Trainer(
            model, arguments, train_dataset=rows, eval_dataset=rows,  # type: ignore[arg-type]
            compute_metrics=lambda _: {"early": -made[0].state.global_step},
        )
    )  # fmt: skip
    tunerkit.attach(model, made[0])
    made[0].train()
    assert tunerkit.tuner(model).steps == 5
    assert live(model) == 4 * len(tunerkit.tuner(model).targets)


def test_init_rank_equal_to_target_rank_works_and_below_it_is_refused() -> None:
    """If equal, there is nothing to prune, and training works. A target above the initial rank is a clear error."""
    model = wrapped(init_rank=2, target_rank=2)
    train(model, attached(model))
    assert live(model) == 6
    with pytest.raises(tunerkit.errors.ConfigError, match="target_rank 5 is above init_rank 4"):
        wrapped(init_rank=4, target_rank=5)


@pytest.mark.filterwarnings("ignore:these adapters never ran")
@pytest.mark.parametrize("how", ["unused", "frozen"])
def test_a_target_that_is_unused_or_frozen_is_no_crash(how: str) -> None:
    """Without a gradient it has no importance: it is pruned first, and the budget is exact."""
    model = wrapped()
    if how == "unused":
        model.forward = lambda x: model.c(torch.tanh(torch.zeros(len(x), 7) + model.a(x)[:, :7]))  # type: ignore[method-assign, operator]
    else:
        for parameter in layers(model)[1].parameters():
            parameter.requires_grad_(False)
    train(model, attached(model))
    assert live(model) == 6
    assert tunerkit.tuner(model).ranks()["b"] == 0


def test_missing_the_one_step_of_the_last_allocation_only_delays_it() -> None:
    """If step T − t_f is skipped, the next step allocates, and the budget is exact."""
    model = wrapped()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    numbers = iter(number for number in range(1, TOTAL + 1) for _ in range(2) if number != 14)
    tuner = tunerkit.tuner(model)
    tunerkit.steps.drive([tuner], optimizer, total_steps=TOTAL, clock=lambda: next(numbers))
    train(model, optimizer, TOTAL - 1)
    assert [change.step for change in tuner.history] == [6, 9, 12, 15]
    assert live(model) == 6


@pytest.mark.parametrize("exact_svd", [True], ids=["svd form"], indirect=True)
@pytest.mark.parametrize("name", ["E", "model", "layers", "lin", "bert", "query", "lora_E", "weight"])
def test_adapter_names_that_are_part_of_a_module_path_train_save_and_load(name: str, tmp_path: Path) -> None:
    """Names are never matched against paths; test_adapters.py draws 300. The form has no part in that."""
    model = tunerkit.wrap(bert(), "adalora", SETTINGS, adapter=name, seed=0)
    optimizer = attached(model)
    for _ in range(TOTAL):
        optimizer.zero_grad()
        model(**bert_batch()).loss.backward()
        optimizer.step()
    loaded = tunerkit.load(bert(), tunerkit.save(model, tmp_path, adapter=name), adapter=name)
    assert torch.equal(loaded.eval()(**bert_batch()).logits, model.eval()(**bert_batch()).logits)


def test_a_pruned_adapter_is_loaded_into_a_base_that_was_built_without_memory(tmp_path: Path) -> None:
    """The base is built on meta, and its weights are assigned, as in low-memory loading."""
    model = wrapped()
    train(model, attached(model))
    path = tunerkit.save(model, tmp_path)
    with torch.device("meta"):
        base = Net()
    base.load_state_dict(Net().state_dict(), assign=True)
    assert torch.equal(tunerkit.load(base, path)(X), model(X))


LAYERS: dict[str, tuple[nn.Module, Tensor]] = {
    "Conv1d": (nn.Conv1d(4, 6, 3, padding=1), torch.randn(8, 4, 5)),
    "Conv2d grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), torch.randn(8, 4, 5, 5)),
    "Conv2d depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), torch.randn(8, 4, 5, 5)),
    "Conv3d": (nn.Conv3d(4, 6, 3, padding=1), torch.randn(8, 4, 3, 3, 3)),
    "Embedding": (nn.Embedding(9, 6), torch.randint(0, 9, (8, 5))),
}


class Pooled(nn.Module):
    """One layer of a kind, averaged over its positions, and a classifier."""

    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        result: Tensor = self.head(h.mean(1) if h.ndim == 3 and not x.is_floating_point() else h.flatten(2).mean(2))
        return result


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_that_peft_refuses_are_adapted(kind: str, tmp_path: Path) -> None:
    """Train, prune to the budget, save, load, merge: the outputs are the same."""
    layer, x = LAYERS[kind]

    def new() -> nn.Module:
        torch.manual_seed(0)
        for module in (made := Pooled(copy.deepcopy(layer), 4 if "depthwise" in kind else 6)).modules():
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.3)
        return made

    model = tunerkit.wrap(new(), "adalora", {**SETTINGS, "targets": ["layer"], "train_modules": ["head"]}, seed=0)
    train(model, attached(model), x=x)
    adapted = model(x).detach()
    assert live(model) == 2
    path = tunerkit.save(model, tmp_path)
    tunerkit.merge(model)
    assert (model(x) - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    tunerkit.unwrap(tunerkit.unmerge(model))
    assert torch.equal(tunerkit.load(new(), path)(x), adapted)


def test_a_compiled_model_is_one_graph() -> None:
    """`fullgraph=True` raises at a break; compiled output equals eager output.

    For recompilation see test_compile.py.
    """
    model = wrapped()
    train(model, attached(model), 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(X), model(X), atol=1e-6)


def test_a_second_trainable_adapter_is_no_error() -> None:
    """Two in one model, both trained, each to its own budget. Alternating training is in test_several.py."""
    model = tunerkit.wrap(wrapped(), "adalora", {"targets": ["a", "b"], **SETTINGS}, adapter="second", seed=1)
    train(model, attached(model))
    assert [sum(tunerkit.tuner(model, name).ranks().values()) for name in ("default", "second")] == [6, 4]
