"""GRPO and RLOO with `use_vllm`, on a stand-in for vLLM that records its weights and answers with fixed completions."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit.errors import AdapterError, StepError

pytest.importorskip("trl", reason="the trainers are TRL's")
pytest.importorskip("datasets", reason="TRL takes its data from it")
import datasets
import trl
from transformers import LlamaConfig, LlamaForCausalLM
from trl.generation import vllm_generation

from tests.support.toys import group_of_one as group_of_one
from tests.support.trainer_toys import VOCABULARY, tokenizer
from tunerkit.hooks import specs
from tunerkit.hooks.loading import Catalog
from tunerkit_transformers import merged_sync

TRL: Any = trl  # untyped in part
LENGTH = 4  # of each completion
PRESENT = "use_vllm sends the parameters to vLLM by name.* Set use_vllm=False"
MODES: dict[str, dict[str, Any]] = {
    "colocate": {},
    "colocate, asleep between": {"vllm_enable_sleep_mode": True},
    "server": {"vllm_mode": "server"},
}
pytestmark = [
    pytest.mark.usefixtures("toys"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]


class Engine:
    """Stands for vLLM's ``LLM`` and for TRL's client of its server: one object, with the calls of both.

    Attributes:
        weights: Copies of the weights that it has now, by name; empty while it sleeps.
        syncs: How often it has got all of them.
        at_generation: Called with each batch of prompts.
    """

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.syncs = 0
        self.at_generation: Callable[[], object] = lambda: None
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))

    def load_weights(self, named: list[tuple[str, Tensor]]) -> None:
        self.weights.update({name: tensor.clone() for name, tensor in named})

    def update_named_params(self, metadata: list[tuple[str, str, list[int]]], named: Any) -> None:
        """As the server does: what comes is what was announced by an earlier walk, in its order."""
        for (name, dtype, shape), (found, tensor) in zip(metadata, named, strict=True):
            assert (name, dtype, shape) == (found, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            self.load_weights([(name, tensor)])

    def reset_prefix_cache(self) -> None:
        self.syncs += 1

    def sleep(self, level: int) -> None:
        self.weights.clear()

    def wake_up(self, tags: list[str]) -> None: ...

    def init_communicator(self, device: object) -> None: ...

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def generate(self, prompts: list[Any], n: int = 1, sampling_params: Any = None, **_: Any) -> Any:
        """Completions of other words each, of which each token has the probability 1 / V."""
        self.at_generation()
        answers = [[3 + (i + j) % (VOCABULARY - 3) for j in range(LENGTH)] for i in range(n * len(prompts))]
        chance = -torch.tensor(float(VOCABULARY)).log().item()
        if sampling_params is None:  # the server's client
            return {"prompt_ids": prompts, "completion_ids": answers, "logprobs": [[[chance]] * LENGTH] * len(answers)}
        ranked = [[{token: SimpleNamespace(rank=1, logprob=chance)} for token in answer] for answer in answers]
        return [
            SimpleNamespace(**prompt, outputs=[SimpleNamespace(token_ids=answer, logprobs=top)])
            for prompt, answer, top in zip(prompts, answers, ranked, strict=True)
        ]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The stand-in, in the place of vLLM in TRL."""
    found = Engine()
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    for name in ("LLM", "VLLMClient"):
        monkeypatch.setattr(vllm_generation, name, lambda **_: found, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setattr(vllm_generation, "os", SimpleNamespace(environ={}))  # where it would say that it is rank 0
    monkeypatch.setattr(vllm_generation, "ensure_master_addr_port", lambda: None)
    return found


def llama(method: str = "toy-low-rank", *, tied: bool = False, dtype: Any = None, **config: Any) -> Any:
    """A small Llama with an adapter that changes the output already."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=2, tie_word_embeddings=tied, **sizes)
    ).to(dtype)
    tunerkit.wrap(model, method, {"targets": ["q_proj", "down_proj"], **config}, seed=0)
    for parameter in tunerkit.tuner(model).parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def trainer_of(model: nn.Module, folder: Path, kind: str = "GRPO", **options: Any) -> Any:
    quiet: dict[str, Any] = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    chosen = getattr(TRL, f"{kind}Config")(
        output_dir=str(folder), use_vllm=True, max_steps=6, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=LENGTH, learning_rate=0.05, beta=0.0, bf16=False, **quiet, **options,
    )  # fmt: skip
    return getattr(TRL, f"{kind}Trainer")(
        model, args=chosen, train_dataset=datasets.Dataset.from_dict({"prompt": ["w1 w2 w3"] * 24}),
        reward_funcs=lambda completions, **_: [float(i) for i, _ in enumerate(completions)],
        processing_class=tokenizer(folder),
    )  # fmt: skip


def merged(model: nn.Module) -> dict[str, Tensor]:
    """The weights with the adapters merged, of a copy."""
    return dict(tunerkit.unwrap(copy.deepcopy(model), keep_merged=True).named_parameters())


def own(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the base's weights in the wrapped model as they stand."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".tunerkit." not in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether names, their order, dtypes and all bits are equal."""
    return list(one) == list(other) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True)
    )


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "toy": ("toy-low-rank", {}),
    "lora": ("lora", {"rank": 2}),
    "adalora": ("adalora", {}),
    "dora": ("dora", {"rank": 2}),
    "trained head": ("lora", {"rank": 2, "train_modules": ["lm_head", "norm"]}),
}
RUNS = (
    [("GRPO", mode, "toy") for mode in MODES]
    + [("RLOO", "server", "toy")]
    + [("RLOO", "colocate", method) for method in METHODS]
)


@pytest.mark.parametrize(("kind", "mode", "method"), RUNS)
def test_vllm_generates_with_the_merged_weights_under_the_base_s_names(
    kind: str, mode: str, method: str, engine: Engine, tmp_path: Path
) -> None:
    """At each generation it has those of `unwrap(copy, keep_merged=True)`, and the base is never changed."""
    name, config = METHODS[method]
    model = llama(name, **config)
    before, seen = own(model), []
    trainer = trainer_of(model, tmp_path, kind, **MODES[mode])
    tunerkit.attach(model, trainer)

    def compare() -> None:
        assert same(engine.weights, merged(model))
        seen.append(dict(engine.weights))

    engine.at_generation = compare
    trainer.train()
    assert len(seen) == 6
    changed = [name for name in before if not torch.equal(seen[0][name], seen[5][name])]
    assert len(changed) == (6 if method == "trained head" else 4)
    assert same(own(model), before)


def test_a_process_group_that_vllm_opens_needs_no_plugin(
    engine: Engine, tmp_path: Path, group_of_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the trainer vLLM opens one of this process alone, which else would mean that others train too."""
    asked = Catalog.asked  # as without tunerkit-distributed
    monkeypatch.setattr(Catalog, "asked", lambda self, hook: [] if hook is specs.tunerkit_engine else asked(self, hook))
    model = llama()
    trainer = trainer_of(model, tmp_path)
    tunerkit.attach(model, trainer)
    trainer.train()
    assert tunerkit.tuner(model).steps == 6


def test_two_hundred_syncs_in_bf16_change_no_bit(engine: Engine, tmp_path: Path) -> None:
    """Each one sends the same bits too; adding and subtracting ΔW in bf16 would wear the base down."""
    model = llama(dtype=torch.bfloat16)
    before, expected = own(model), merged(model)
    trainer = trainer_of(model, tmp_path)
    tunerkit.attach(model, trainer)
    for _ in range(200):
        trainer.vllm_generation.sync_weights()
    assert engine.syncs == 200
    assert same(engine.weights, expected)
    assert same(own(model), before)
    assert not same(expected, before)


def test_a_walk_that_is_not_finished_leaves_the_model_unmerged(engine: Engine, tmp_path: Path) -> None:
    """The consumer may raise, or keep the walk for ever: training goes on, and the next sync is complete."""
    model = llama()
    before = own(model)
    trainer = trainer_of(model, tmp_path)
    tunerkit.attach(model, trainer)
    kept = trainer.vllm_generation._iter_named_params()
    assert next(kept)[0] == "model.embed_tokens.weight"
    assert same(own(model), before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "load_weights", lambda named: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.vllm_generation.sync_weights()
    assert same(own(model), before)
    trainer.train()
    assert same(own(model), before)
    assert tunerkit.tuner(model).steps == 6


def test_a_model_that_the_user_has_merged_is_sent_as_it_is(engine: Engine, tmp_path: Path) -> None:
    """It stays merged. Inside `disabled` a sync raises; after `unwrap`, TRL walks over the plain model itself."""
    model = llama()
    expected = merged(model)
    trainer = trainer_of(model, tmp_path)
    tunerkit.attach(model, trainer)
    sync = trainer.vllm_generation.sync_weights
    tunerkit.merge(model)
    sync()
    assert same(engine.weights, expected)
    with tunerkit.disabled(model), pytest.raises(AdapterError, match="disabled"):
        sync()
    assert same(own(model), expected)
    tunerkit.unwrap(tunerkit.unmerge(model))
    sync()
    assert same(engine.weights, own(model))
    assert not same(engine.weights, expected)


def without_walk(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    patch.delattr(vllm_generation.VLLMGeneration, "_iter_named_params")


def without_names(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    patch.delattr(vllm_generation.VLLMGeneration, "_fix_param_name_to_vllm")


def of_another_trainer(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(merged_sync, "_TRAINERS", ())


def quantised(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    trainer.model.is_quantized = True


def of_two_processes(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(type(trainer.accelerator), "num_processes", 2)


def with_fsdp(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    trainer.is_fsdp_enabled = True


def with_deepspeed(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(merged_sync, "runs_deepspeed", lambda trainer: True)


def without_delta(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("tunerkit.hooks.has_delta", lambda method: False)


REFUSED: list[tuple[Callable[[Any, pytest.MonkeyPatch], None], str]] = [
    *((change, PRESENT) for change in (without_walk, without_names, of_another_trainer, quantised)),
    (of_two_processes, "trains on 2 processes.* tunerkit_serving.publisher"),
    (with_fsdp, "trains with FSDP"),
    (with_deepspeed, "trains with DeepSpeed"),
    (without_delta, "implements neither tunerkit_delta nor tunerkit_factors.* tunerkit_serving.publisher"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_vllm_would_not_get_right_is_refused_before_training(
    change: Callable[[Any, pytest.MonkeyPatch], None], words: str, engine: Engine, tmp_path: Path
) -> None:
    """The error comes at attach, with the way out, and nothing has been changed."""
    model = llama()
    before = own(model)
    trainer = trainer_of(model, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        change(trainer, patch)
        with pytest.raises(StepError, match=words):
            tunerkit.attach(model, trainer)
    assert same(own(model), before)
    assert "_iter_named_params" not in vars(trainer.vllm_generation)


@pytest.mark.parametrize("how", ["targets", "train_modules"])
def test_adapted_tied_weights_are_refused(how: str, engine: Engine, tmp_path: Path) -> None:
    """The engine has one weight for both and skips the head's; adapters beside the tie are synced."""
    beside = llama(tied=True)
    tunerkit.attach(beside, trainer_of(beside, tmp_path))
    config: dict[str, Any] = {how: ["embed_tokens", "lm_head"]}
    model = llama(tied=True, **config)
    before = own(model)
    trainer = trainer_of(model, tmp_path)
    with pytest.raises(StepError, match=r"'lm_head.weight' is tied to another weight.* \(exclude=...\)"):
        tunerkit.attach(model, trainer)
    assert same(own(model), before)
    assert model.config.tie_word_embeddings is True
