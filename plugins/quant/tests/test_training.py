"""Quantised bases under trainers: transformers' and TRL's, bitsandbytes' optimizers, checkpointing, compile."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import tunerkit
from plugins.quant.tests import tiny_llama
from plugins.quant.tests.quantised import MODELS, TARGETS, X, skip_without_library

METHODS: dict[str, dict[str, Any]] = {"lora": {"rank": 4, "alpha": 8}, "adalora": {"target_rank": 2, "init_rank": 4}}
FLAG = "_hf_peft_config_loaded"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*on a base with another quantization"),
    pytest.mark.filterwarnings("ignore:.*4 bits"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("tunerkit_adalora")
    return tiny_llama.save(tmp_path_factory.mktemp("base"))


def wrapped(base: Path, form: str, method: str = "adalora") -> Any:
    return tunerkit.wrap(tiny_llama.load(base, form), method, METHODS[method], seed=0)


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "save_steps": 4,
        "logging_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    } | options


def trainer_of(model: Any, folder: Path, **options: Any) -> Any:
    import transformers

    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(**arguments(folder, **options)), train_dataset=tiny_llama.rows()
    )
    tunerkit.attach(model, trainer)
    return trainer


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_trainer_trains_checkpoints_and_resumes(base: Path, form: str, tmp_path: Path) -> None:
    """Bit for bit, with gradient checkpointing, also from a checkpoint after the ranks shrank."""
    whole = wrapped(base, form)
    trainer_of(whole, tmp_path / "whole", gradient_checkpointing=True).train()
    assert {p.dtype for p in tunerkit.tuner(whole).parameters()} == {torch.float32}
    assert sum(tunerkit.tuner(whole).ranks().values()) == 2 * 14
    again = wrapped(base, form)
    trainer_of(again, tmp_path / "again", gradient_checkpointing=True).train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4")
    )
    assert torch.equal(tiny_llama.logits(again), tiny_llama.logits(whole))
    loaded = tunerkit.load(tiny_llama.load(base, form), tmp_path / "whole" / "checkpoint-8")
    assert torch.equal(tiny_llama.logits(loaded), tiny_llama.logits(whole))


def test_the_mark_for_trainers_is_set_and_taken_back(base: Path, tmp_path: Path) -> None:
    """A Trainer refuses the model without; ``save_pretrained`` writes the base all the same."""
    import transformers

    model = tiny_llama.load(base, "nf4")
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model, transformers.TrainingArguments(**arguments(tmp_path)))
    tunerkit.wrap(model, "adalora", METHODS["adalora"])
    assert vars(model)[FLAG] is True
    with pytest.warns(tunerkit.TunerkitWarning, match="save_pretrained writes the base"):
        model.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").exists()
    assert vars(model)[FLAG] is True
    tunerkit.unwrap(model)
    assert FLAG not in vars(model)
    plain = tiny_llama.load(base)
    assert FLAG not in vars(tunerkit.wrap(plain, "adalora", METHODS["adalora"]))


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_trl_casts_no_adapter(base: Path, form: str, tmp_path: Path) -> None:
    """TRL casts everything trainable to bf16 on a quantised base; `attach` gives adapters their dtype back."""
    trl: Any = pytest.importorskip("trl")
    datasets: Any = pytest.importorskip("datasets")
    model = wrapped(base, form)
    rows = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in tiny_llama.rows()])
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**arguments(tmp_path, bf16=False, dataset_kwargs={"skip_prepare_dataset": True}, pad_token="0")),
        train_dataset=rows,
        processing_class=_tokenizer(),
    )
    tunerkit.attach(model, trainer)
    assert {p.dtype for p in tunerkit.tuner(model).parameters()} == {torch.float32}
    trainer.train()
    assert {p.dtype for p in tunerkit.tuner(model).parameters()} == {torch.float32}
    assert trainer.state.log_history[1]["loss"] < trainer.state.log_history[0]["loss"]


def _tokenizer() -> Any:
    """A tokenizer whose words are the numbers of the tiny vocabulary."""
    import transformers

    tokenizers: Any = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({str(number): number for number in range(32)}, unk_token="0")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), unk_token="0", pad_token="0", eos_token="1"
    )


def test_unwrapping_to_dense_gives_an_ordinary_model_of_transformers(base: Path, tmp_path: Path) -> None:
    """It is saved, and loaded without bitsandbytes, with the same logits."""
    model = wrapped(base, "nf4")
    trainer_of(model, tmp_path / "run").train()
    expected = tiny_llama.logits(model)
    dense = tunerkit.unwrap(model, keep_merged=True, dtype=torch.float32)
    assert not dense.is_quantized
    assert not dense.is_loaded_in_4bit
    dense.save_pretrained(tmp_path / "dense")
    loaded = tiny_llama.load(tmp_path / "dense")
    assert not hasattr(loaded.config, "quantization_config")
    assert torch.allclose(tiny_llama.logits(loaded), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit"])
def test_optimizers_of_bitsandbytes_shrink_or_keep_masks(base: Path, name: str) -> None:
    """8-bit states are kept in blocks, which cannot be cut: ranks are then masked, and a warning says so."""
    bnb: Any = pytest.importorskip("bitsandbytes")
    model = wrapped(base, "nf4")
    optimizer = getattr(bnb.optim, name)(list(tunerkit.tuner(model).parameters()), lr=1e-2, min_8bit_size=64)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tunerkit.attach(model, optimizer, total_steps=8)
        ids = torch.stack([row["input_ids"] for row in tiny_llama.rows(4)])
        for _ in range(8):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    ranks = tunerkit.tuner(model).ranks()
    assert sum(ranks.values()) == 2 * 14
    shapes = {path: each.get_parameter("p").shape[1] for path, each in tunerkit.tuner(model).adapters().items()}
    masked = any("mask" in str(warning.message) for warning in told)
    assert shapes == ranks or masked


@pytest.mark.parametrize("name", MODELS)
def test_compiled_models_train_where_the_library_can(name: str) -> None:
    """With graph breaks where it has them: the same loss and gradients as without compile."""
    skip_without_library(name)
    make = MODELS[name]
    pytest.importorskip("tunerkit_lora")
    results = []
    for compiled in (False, True):
        model = tunerkit.wrap(make(), "lora", {"rank": 2, "targets": list(TARGETS)}, seed=0)
        with torch.no_grad():
            for number, parameter in enumerate(tunerkit.tuner(model).parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 10)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        run(X).square().mean().backward()
        results.append([p.grad for p in tunerkit.tuner(model).parameters()])
    for one, other in zip(*results, strict=True):
        assert one is not None
        assert other is not None
        assert (one - other).abs().max() <= 1e-4 * one.abs().max()


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_compiled_model_shows_the_base_and_merges(base: Path, form: str) -> None:
    """Where a library breaks the graph, dynamo compiles the parts of our hook by themselves."""
    pytest.importorskip("bitsandbytes")
    model = wrapped(base, form, "lora").eval()
    run = torch.compile(model, backend="eager")
    ids = torch.stack([row["input_ids"] for row in tiny_llama.rows(4)])
    with torch.no_grad():
        before = run(ids).logits
        with tunerkit.disabled(model):
            run(ids)
        assert torch.equal(run(ids).logits, before)
        tunerkit.merge(model)
        run(ids)
        tunerkit.unmerge(model)
        assert torch.equal(run(ids).logits, before)


@pytest.mark.parametrize("name", MODELS)
def test_hooks_of_accelerate_are_seen_through(name: str) -> None:
    """``device_map`` puts a forward on each instance that only moves tensors; what is behind it decides."""
    skip_without_library(name)
    make = MODELS[name]
    pytest.importorskip("tunerkit_lora")
    pytest.importorskip("tunerkit_distributed", reason="it knows accelerate's hooks")
    hooks: Any = pytest.importorskip("accelerate.hooks")
    model = make()
    for path in TARGETS:
        hooks.add_hook_to_module(model[int(path)], hooks.AlignDevicesHook(execution_device="cpu"))
    tunerkit.wrap(model, "lora", {"rank": 2, "targets": list(TARGETS)}, seed=0)
    model(X).square().mean().backward()
    assert all(p.grad is not None for p in tunerkit.tuner(model).parameters())
