"""PEFT's config objects of methods, without the settings that PEFT fills in; and tokens of tied models, both ways."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import tunerkit
from tunerkit.errors import ConfigError, TargetError
from tunerkit_methods.trainable_tokens import Rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
SIZES: dict[str, Any] = {
    **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.3},
}
T5: dict[str, Any] = {
    **{"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
    **{"pad_token_id": 0, "decoder_start_token_id": 0},
}
GPT2: dict[str, Any] = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
IDS = torch.tensor([[5, 3, 9, 1], [2, 8, 8, 4]])
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "qwen2, tied": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)
    ),
    "gpt2, tied": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=1)),
    "t5, tied": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "bert, tied": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES, max_position_embeddings=16)),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def output(model: Any) -> Tensor:
    decoded = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    found: Tensor = model(input_ids=IDS, **decoded).logits
    return found


def trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


OBJECTS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "IA3Config()": ("ia3", lambda embedding: peft.IA3Config()),
    "tokens": ("trainable-tokens", lambda embedding: peft.TrainableTokensConfig(token_indices=[3, 5])),
    "tokens of a named embedding": (
        "trainable-tokens",
        lambda embedding: peft.TrainableTokensConfig(token_indices=[3, 5], target_modules=[embedding]),
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("made", OBJECTS)
def test_what_peft_fills_in_is_filled_in(name: str, made: str) -> None:
    """As many parameters are trained as PEFT trains."""
    method, config = OBJECTS[made]
    ours, base = built(name), built(name)
    at: Any = ours
    embedding = next(path for path, module in ours.named_modules() if module is at.get_input_embeddings())
    model = tunerkit.wrap(ours, method, config(embedding.rpartition(".")[2]))
    theirs = peft.get_peft_model(base, config(embedding.rpartition(".")[2]))  # type: ignore[arg-type]
    assert trained(model) == trained(theirs) > 0


def test_inputs_that_are_no_targets_are_left_out() -> None:
    """PEFT's default of what IA³ multiplies at the input names modules that it then does not adapt."""
    config = peft.IA3Config(target_modules=["k_proj", "v_proj"])
    tuner = tunerkit.tuner(tunerkit.wrap(built("llama"), "ia3", config))
    assert tunerkit.unstructure(tuner.config)["feedforward"] == []


def test_a_model_for_which_peft_has_no_default_asks_for_it() -> None:
    """As PEFT does; and the second call of the message works."""
    config = peft.IA3Config(target_modules=["0"])
    with pytest.raises(ConfigError, match=r"'feedforward_modules' is missing, .* write feedforward_modules=\[\] @"):
        tunerkit.wrap(nn.Sequential(nn.Linear(4, 3)), "ia3", config)
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    assert trained(tunerkit.wrap(nn.Sequential(nn.Linear(4, 3)), "ia3", config)) == 3


@pytest.mark.parametrize("name", MODELS)
def test_tokens_go_both_ways(tmp_path: Path, name: str) -> None:
    """PEFT's folder computes the same here; trained on, it computes the same in PEFT, and its rows stay tied."""
    theirs: Any = peft.get_peft_model(built(name), peft.TrainableTokensConfig(token_indices=[3, 5]))  # type: ignore[arg-type]
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2 if parameter.requires_grad else 0)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = tunerkit.load(built(name), tmp_path / "theirs", trainable=True)
    assert close(output(model), output(theirs.eval()))
    assert trained(model) == 2 * 16
    output(model).square().mean().backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    again: Any = peft.PeftModel.from_pretrained(built(name), str(tunerkit.export(model, tmp_path / "ours")))  # type: ignore[arg-type]
    assert close(output(again.eval()), output(model))
    assert not close(output(model), output(theirs))
    merged = output(tunerkit.unwrap(tunerkit.load(built(name), tunerkit.save(model, tmp_path)), keep_merged=True))
    assert close(merged, output(model))


def test_tokens_of_a_head_alone_are_refused(tmp_path: Path) -> None:
    """PEFT changes no embedding then, and an adapter on one side of a tied weight would change one side."""
    config = peft.TrainableTokensConfig(token_indices=[3, 5], target_modules=["lm_head"])
    peft.get_peft_model(built("qwen2, tied"), config).save_pretrained(str(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(tunerkit.errors.FileError, match=r"lm_head\.trainable_tokens_delta belongs to a Linear here"):
        tunerkit.load(built("qwen2, tied"), tmp_path)
    with pytest.raises(TargetError, match="lm_head: has a tied weight"):
        tunerkit.wrap(built("qwen2, tied"), "trainable-tokens", config)


@pytest.mark.filterwarnings("error::tunerkit.TunerkitWarning")
def test_tokens_of_a_named_side_of_a_tie_are_no_surprise(tmp_path: Path) -> None:
    """PEFT's folder names the embedding, and the other side comes with it: no warning says that it is not named."""
    config = peft.TrainableTokensConfig(token_indices=[3], target_modules=["embed_tokens"])
    peft.get_peft_model(built("qwen2, tied"), config).save_pretrained(str(tmp_path))  # type: ignore[arg-type]
    assert len(tunerkit.tuner(tunerkit.load(built("qwen2, tied"), tmp_path)).ranks()) == 2


@pytest.mark.parametrize(
    ("name", "tokens", "calls"),
    [
        ("llama", {"embed_tokens": [3, 1], "lm_head": [2]}, 2),
        ("qwen2, tied", {"embed_tokens": [1]}, 1),
        ("qwen2, tied", {"embed_tokens": [1], "lm_head": [1]}, 1),
        ("qwen2, tied", {"embed_tokens": [1], "lm_head": [2]}, 0),
        ("qwen2, tied", {"lm_head": [2]}, 0),
        ("qwen2, tied", [4, 2], 1),
    ],
)
def test_the_calls_for_rows_beside_a_lora_work(name: str, tokens: Any, calls: int) -> None:
    """They train as many parameters as PEFT does; where no call can, PEFT is named."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
    theirs = peft.get_peft_model(built(name), config)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'trainable_token_indices' is ") as raised:
        tunerkit.wrap(built(name), "lora", config)
    told, config.trainable_token_indices = str(raised.value), None
    lines = told.partition("wrap once more: ")[2].removesuffix(" @ $").split(" and ") if calls else []
    assert len(lines) == calls
    assert calls or "train it with PEFT" in told
    model = tunerkit.wrap(built(name), "lora", config)
    for line in lines:
        exec(line, {"tunerkit": tunerkit, "model": model})
    assert not calls or trained(model) == trained(theirs)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def test_sides_of_a_tie_with_rows_that_differ_are_refused(tmp_path: Path) -> None:
    """PEFT's folder has the rows of each side, and they are the same ones."""
    from safetensors.torch import load_file, save_file

    theirs = peft.get_peft_model(built("qwen2, tied"), peft.TrainableTokensConfig(token_indices=[3]))  # type: ignore[arg-type]
    theirs.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.trainable_tokens_delta"] += 1
    save_file(tensors, file)
    with pytest.raises(tunerkit.errors.FileError, match="differ, and their modules are tied"):
        tunerkit.load(built("qwen2, tied"), tmp_path)


def test_a_tie_by_the_setting_alone_is_refused() -> None:
    """One set of rows would begin at another weight's."""
    settings = {"tokens": [3], "targets": ["embed_tokens", "lm_head"], "tied": True}
    with pytest.raises(TargetError, match="tied is True, and the targets are not several modules with one weight"):
        tunerkit.wrap(built("llama"), "trainable-tokens", settings)


def test_an_earlier_file_keeps_rows_of_each_side(tmp_path: Path) -> None:
    """Without the setting ``tied``, as older files are, each side has its own; and so it is written on request."""
    model = tunerkit.wrap(built("qwen2, tied"), "trainable-tokens", {"tokens": [3], "tied": False})
    adapters = tunerkit.tuner(model).adapters()
    assert trained(model) == 2 * 16
    with torch.no_grad():
        for number, adapter in enumerate(adapters.values()):
            assert isinstance(adapter, Rows)
            adapter.rows.add_(number + 1.0)
    again = tunerkit.load(built("qwen2, tied"), tunerkit.save(model, tmp_path))
    assert torch.equal(output(again), output(model))
    with pytest.raises(tunerkit.errors.FileError, match="form='uniform' writes a LoRA"):
        tunerkit.export(model, tmp_path / "theirs")


@pytest.mark.parametrize(
    "config", [{"tokens": []}, peft.TrainableTokensConfig(target_modules=["embed_tokens"])], ids=["ours", "PEFT's"]
)
def test_no_tokens_are_refused(config: Any) -> None:
    """An empty list is no wish for the special tokens, which are trained where the setting is left out."""
    with pytest.raises(ConfigError, match="expected ids of tokens, got none; leave it out for the model's special"):
        tunerkit.wrap(built("llama"), "trainable-tokens", config)
