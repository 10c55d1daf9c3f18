"""TRL's preference trainers with a toy method: the reference model, what is held in memory, and casts."""

import gc
import math
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit

pytest.importorskip("trl", reason="the trainers are TRL's")
pytest.importorskip("datasets", reason="TRL takes its data from it")
import datasets
import trl
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.trainer_toys import VOCABULARY, TokenRows, tokenizer

TRL: Any = trl  # it is untyped in part: it exports names lazily, and takes models of transformers only
LN2 = math.log(2)
QUIET: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "report_to": [],
    "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "bf16": False,
}  # fmt: skip
pytestmark = [
    pytest.mark.usefixtures("toys"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama on disk, from where TRL loads its reference models."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)  # type: ignore[arg-type]
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def llama(base: Path, *, method: str | None = "toy-low-rank") -> Any:
    model = LlamaForCausalLM.from_pretrained(base)
    return model if method is None else tunerkit.wrap(model, method, {"targets": ["q_proj", "down_proj"]}, seed=0)


def fine_tuned(model: nn.Module) -> nn.Module:
    """``model`` after three steps of a plain loop on next-token prediction."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    tunerkit.attach(model, optimizer, total_steps=3)
    for _ in range(3):
        ids = TokenRows(8).ids
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def started(base: Path, start: str) -> nn.Module:
    """A wrapped model, fresh or with a fine-tuning that was merged into the base or is still in the adapter."""
    if start == "fresh":
        return llama(base)
    model = fine_tuned(llama(base))
    if start == "not merged":
        return model
    return tunerkit.wrap(tunerkit.unwrap(model, keep_merged=True), "toy-low-rank", {"targets": ["q_proj"]})


PAIRS = {
    "prompt": ["w1 w2 w3"] * 8,
    "chosen": [f"w{i} w{i + 1} w{i + 2}" for i in range(8)],
    "rejected": [f"w{i + 9} w{i + 1}" for i in range(8)],
}


def dpo(model: nn.Module, reference: nn.Module | None, folder: Path, *, attach: bool = True, **options: Any) -> Any:
    """A `DPOTrainer`, and the list into which it writes the exact loss of each step."""
    chosen = TRL.DPOConfig(output_dir=str(folder), **(QUIET | options))
    rows = datasets.Dataset.from_dict(PAIRS)
    trainer = TRL.DPOTrainer(
        model, ref_model=reference, args=chosen, train_dataset=rows, processing_class=tokenizer(folder)
    )
    losses: list[float] = []
    compute = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        found = compute(*args, **kwargs)
        losses.append((found[0] if isinstance(found, tuple) else found).item())
        return found

    trainer.compute_loss = compute_loss
    if attach:
        tunerkit.attach(model, trainer)
    return trainer, losses


STARTS = ["fresh", "merged", "not merged"]


@pytest.mark.parametrize("start", STARTS)
def test_the_first_loss_of_dpo_is_ln_2(start: str, base: Path, tmp_path: Path) -> None:
    """The reference is the model as it stands, so both agree before the first step, and not after it."""
    model = started(base, start)
    trainer, losses = dpo(model, tunerkit.reference(model), tmp_path)
    trainer.train()
    assert abs(losses[0] - LN2) < 1e-6
    assert abs(losses[1] - LN2) > 1e-6


@pytest.mark.parametrize("start", STARTS)
def test_attach_drops_the_reference_that_trl_loaded(start: str, base: Path, tmp_path: Path) -> None:
    """TRL loads the base from disk, which after a merged fine-tuning is another model; the first loss is ln 2."""
    model = started(base, start)
    with pytest.warns(tunerkit.TunerkitWarning, match="a second time from .* as its reference model. It was dropped"):
        trainer, losses = dpo(model, None, tmp_path)
    assert trainer.ref_model.source is model
    trainer.train()
    assert abs(losses[0] - LN2) < 1e-6


def reached(start: object) -> dict[int, Tensor]:
    """Every tensor that the garbage collector finds below ``start``, by the address of its storage.

    Modules, classes and the globals of functions belong to the process and not to the trainer.
    """
    seen: set[int] = set()
    waiting: list[Any] = [start]
    found: dict[int, Tensor] = {}
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, type | types.ModuleType | types.FrameType):
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            found[each.untyped_storage().data_ptr()] = each
        if isinstance(each, types.FunctionType):
            waiting += [each.__closure__, each.__defaults__, vars(each)]
        else:
            waiting += gc.get_referents(each)
    return found


def matrices(tensors: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors if t.ndim == 2 and t.is_floating_point()}


@pytest.mark.parametrize("passed", [True, False], ids=["passed to TRL", "replaced by attach"])
@pytest.mark.parametrize("start", STARTS)
def test_the_trainer_reaches_every_weight_once(start: str, passed: bool, base: Path, tmp_path: Path) -> None:
    """Base and adapters, and for a trained adapter its frozen copy: no second base is held anywhere."""
    model = started(base, start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tunerkit.TunerkitWarning)
        trainer, _ = dpo(model, tunerkit.reference(model) if passed else None, tmp_path)
    own = matrices(model.parameters())
    found = matrices(reached(trainer).values())
    copies = found - own
    adapters = sum(1 for p in tunerkit.tuner(model).parameters() if p.ndim == 2)
    assert own <= found
    assert len(copies) == (adapters if start == "not merged" else 0)


def test_a_second_base_would_be_seen(base: Path, tmp_path: Path) -> None:
    """Before attach, the search above finds the base that TRL loaded; nothing but the trainer holds it."""
    model = started(base, "fresh")
    trainer, _ = dpo(model, None, tmp_path, attach=False)
    second = matrices(reached(trainer).values()) - matrices(model.parameters())
    assert len(second) == len(matrices(llama(base, method=None).parameters()))


@pytest.mark.parametrize("passed", [True, False], ids=["passed to TRL", "left out"])
def test_reference_values_may_be_computed_in_advance(passed: bool, base: Path, tmp_path: Path) -> None:
    """`precompute_ref_log_probs` runs the reference in the constructor; the losses are those without it."""
    ends = []
    for precomputed in (True, False):
        model = started(base, "not merged")
        reference = tunerkit.reference(model) if passed or not precomputed else None
        trainer, losses = dpo(model, reference, tmp_path, precompute_ref_log_probs=precomputed)
        trainer.train()
        ends.append(losses)
    assert abs(ends[0][0] - LN2) < 1e-6
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)


def test_values_computed_for_another_reference_are_not_used_again(base: Path, tmp_path: Path) -> None:
    """TRL caches them by a digest of the reference's tensors, on the same rows."""
    for start in STARTS:
        model = started(base, start)
        trainer, losses = dpo(model, tunerkit.reference(model), tmp_path, precompute_ref_log_probs=True)
        trainer.train()
        assert abs(losses[0] - LN2) < 1e-6, start


def test_a_moving_reference_is_refused(base: Path, tmp_path: Path) -> None:
    """`sync_ref_model` needs a second full model; the error comes at attach and says what to set."""
    model = llama(base)
    text = "sync_ref_model moves a second full model .* Set sync_ref_model=False"
    with pytest.raises(tunerkit.errors.StepError, match=text):
        dpo(model, tunerkit.reference(model), tmp_path, sync_ref_model=True)


def test_a_reference_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    """It would be a policy against a model that is not its start."""
    with pytest.raises(tunerkit.errors.StepError, match="the reference of another model"):
        dpo(llama(base), tunerkit.reference(llama(base)), tmp_path)


def test_a_reference_model_of_another_checkpoint_stays(base: Path, tmp_path: Path) -> None:
    """Somebody chose it; `attach` drops only what TRL loads from the model's own checkpoint."""
    other = llama(base, method=None)
    other.save_pretrained(tmp_path / "other")
    other = LlamaForCausalLM.from_pretrained(tmp_path / "other")
    trainer, _ = dpo(llama(base), other, tmp_path)
    assert trainer.ref_model is other


def fine_tuned_in_full(model: Any) -> Any:
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.add_(0.01)
    return model


def frozen(model: Any) -> Any:
    return model.requires_grad_(False)


@pytest.mark.parametrize("own", [fine_tuned_in_full, frozen])
@pytest.mark.parametrize("start", STARTS)
def test_a_reference_model_of_the_same_checkpoint_stays_if_somebody_changed_it(
    start: str, own: Any, base: Path, tmp_path: Path
) -> None:
    """TRL loads the weights as they are stored and freezes none, so this one was passed."""
    other = own(llama(base, method=None))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "DPOTrainer had loaded", tunerkit.TunerkitWarning)
        trainer, _ = dpo(started(base, start), other, tmp_path)
    assert trainer.ref_model is other


def test_a_reference_model_as_trl_loads_it_is_replaced_and_the_warning_says_how_to_keep_it(
    base: Path, tmp_path: Path
) -> None:
    """Who loaded it cannot be seen, and TRL's own may be a wrong one."""
    with pytest.warns(tunerkit.TunerkitWarning, match=r"If the reference was yours, freeze it .* after attach"):
        trainer, _ = dpo(started(base, "merged"), llama(base, method=None), tmp_path)
    assert isinstance(trainer.ref_model, type(tunerkit.reference(llama(base))))


def grpo(model: nn.Module, folder: Path, **options: Any) -> Any:
    chosen = TRL.GRPOConfig(
        output_dir=str(folder), num_generations=4, max_completion_length=6, **(QUIET | options)
    )  # fmt: skip
    return TRL.GRPOTrainer(
        model, args=chosen, train_dataset=datasets.Dataset.from_dict({"prompt": PAIRS["prompt"]}),
        reward_funcs=lambda completions, **_: [float(len(text) % 3) for text in completions],
        processing_class=tokenizer(folder),
    )  # fmt: skip


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded by TRL", "never loaded"])
@pytest.mark.parametrize("start", ["fresh", "not merged"])
def test_grpo_measures_its_divergence_from_the_model_as_it_stood(
    start: str, loaded: bool, base: Path, tmp_path: Path
) -> None:
    """With beta 0.1 the divergence is 0 at the first step and not at the second.

    GRPO takes no reference model: `attach` drops the loaded one. Built with beta 0 it loads none, and both are set
    afterwards.
    """
    model = started(base, start)
    trainer = grpo(
        model, tmp_path, beta=0.1 if loaded else 0.0, learning_rate=0.5, logging_strategy="steps", logging_steps=1
    )
    if loaded:
        with pytest.warns(tunerkit.TunerkitWarning, match="GRPOTrainer had loaded"):
            tunerkit.attach(model, trainer)
    else:
        trainer.beta, trainer.ref_model = 0.1, tunerkit.reference(model)
        tunerkit.attach(model, trainer)
    own = matrices(model.parameters())
    adapters = sum(1 for p in tunerkit.tuner(model).parameters() if p.ndim == 2)
    assert len(matrices(reached(trainer).values()) - own) == (0 if start == "fresh" else adapters)
    trainer.train()
    first, second = (row["kl"] for row in trainer.state.log_history if "kl" in row)
    assert abs(first) < 1e-9
    assert second > 1e-6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"use_transformers_continuous_batching": True, "bf16": True}, "casts the whole model to half precision"),
        ({"use_vllm": True}, "use_vllm sends the parameters to vLLM by name"),
    ],
)
def test_ways_to_generate_that_lose_or_cast_adapters_are_refused(
    options: dict[str, Any], text: str, base: Path, tmp_path: Path
) -> None:
    """The options are set on the arguments afterwards: their engines need not be installed."""
    model = llama(base)
    trainer = grpo(model, tmp_path)
    for name, value in options.items():
        setattr(trainer.args, name, value)
    with pytest.raises(tunerkit.errors.StepError, match=text):
        tunerkit.attach(model, trainer)


def test_adapters_keep_their_dtype_on_a_quantised_base(base: Path, tmp_path: Path) -> None:
    """TRL casts everything trainable to bf16 there; adapters and trained copies get back the dtype that they had."""
    model = llama(base, method=None)
    tunerkit.wrap(model, "toy-low-rank", {"targets": ["q_proj"], "train_modules": ["norm"]})
    model.is_loaded_in_8bit = True
    reference = tunerkit.reference(model)
    trainer, _ = dpo(model, reference, tmp_path, attach=False)
    assert {p.dtype for p in tunerkit.tuner(model).parameters()} == {torch.bfloat16}
    tunerkit.attach(model, trainer)
    assert {p.dtype for p in tunerkit.tuner(model).parameters()} == {torch.float32}
