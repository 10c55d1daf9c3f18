"""The file: its tensors add the adapter's products under llama.cpp's rule, and what it cannot hold is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import gguf
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import tunerkit
from plugins.gguf.tests.base_files import LINEAR, causal_lm, randomize
from tunerkit.plugin import factors_of

pytest.importorskip("tunerkit_lora", reason="the adapters are LoRA")

EVERYWHERE = [*LINEAR, "embed_tokens", "lm_head"]
# One rank of its own for each kind of weight; v has the largest.
UNEQUAL = {"q_proj": 3, "k_proj": 2, "v_proj": 7, "o_proj": 1, "embed_tokens": 5, "lm_head": 6}


def adapted(model: Any = None, **config: Any) -> Any:
    """A wrapped model whose adapter has random values."""
    model = tunerkit.wrap(
        causal_lm() if model is None else model, "lora", {"rank": 4, "alpha": 3.0, "targets": LINEAR, **config}, seed=0
    )
    randomize(model)
    return model


def written(model: nn.Module, folder: Path, **options: Any) -> gguf.GGUFReader:
    return gguf.GGUFReader(tunerkit.export(model, folder / "adapter.gguf", format="gguf", **options))


def deltas(reader: gguf.GGUFReader) -> dict[str, Tensor]:
    """What llama.cpp adds to each weight (out, in), by the weight's name.

    After ``build_lora_mm`` and ``build_inp_embd`` in its ``llama-graph.cpp``, and ``get_scale`` in ``llama-adapter.h``.
    """
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    held = {each.name: torch.from_numpy(np.array(each.data, np.float32)) for each in reader.tensors}
    found = {}
    for name in {name.rpartition(".")[0] for name in held}:
        a, b = held[f"{name}.lora_a"], held[f"{name}.lora_b"]
        rank = b.shape[1]
        scale = alpha / rank if alpha else 1.0
        # Rows of the embedding's lora_a are looked up by token, and all others are multiplied.
        found[name] = scale * (b @ a.T if name == "token_embd.weight" else b @ a)
    return found


def expected(model: nn.Module) -> dict[str, Tensor]:
    """ΔW in llama.cpp's names and order of rows, each row moved on its own."""
    heads = {"q_proj": 4, "k_proj": 2}
    names = {
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
        "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    found = {}
    for path, product in factors_of(tunerkit.tuner(model)).items():
        kind, delta = path.rpartition(".")[2], product.p @ product.q
        if kind in heads:
            size = delta.shape[0] // heads[kind]
            at = [
                h * size + i + half * size // 2 for h in range(heads[kind]) for i in range(size // 2) for half in (0, 1)
            ]
            delta = delta[at]
        outer = {"embed_tokens": "token_embd.weight", "lm_head": "output.weight"}
        name = outer.get(kind) or f"blk.{path.split('.')[2]}.{names[kind]}.weight"
        found[name] = delta
    return found


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    largest = max(float(each.abs().max()) for each in wanted.values())
    for name, delta in wanted.items():
        assert float((found[name] - delta).abs().max()) <= tolerance * largest, name


def test_unequal_ranks_everywhere_add_the_same(tmp_path: Path) -> None:
    """With grouped-query attention, an embedding, a head, and another rank at each kind of weight."""
    model = adapted(targets=EVERYWHERE, rank_pattern=UNEQUAL)
    reader = written(model, tmp_path)
    assert_same(deltas(reader), expected(model))
    ranks = {each.name: int(each.shape[0]) for each in reader.tensors if each.name.endswith("lora_b")}
    assert ranks["blk.1.attn_v.weight.lora_b"] == 7
    assert ranks["blk.1.attn_output.weight.lora_b"] == 1


def test_the_metadata_are_those_that_llama_cpp_and_ollama_read(tmp_path: Path) -> None:
    """The alpha is a float with a whole value, the largest rank; names hold no folder."""
    model = adapted(rank_pattern=UNEQUAL | {"embed_tokens": 4, "lm_head": 4}, targets=EVERYWHERE)
    model.config._name_or_path = "/home/someone/models/Tiny-Llama"
    fields = written(model, tmp_path).fields
    values = {name: field.contents() for name, field in fields.items()}
    assert values["general.type"] == "adapter"
    assert values["general.architecture"] == "llama"
    assert values["adapter.type"] == "lora"
    assert values["adapter.lora.alpha"] == 7.0
    assert fields["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]
    assert values["general.name"] == "Tiny-Llama lora"
    assert values["general.base_model.0.name"] == "Tiny-Llama"


def test_an_adapter_in_half_precision_is_written_in_fp32(tmp_path: Path) -> None:
    """And one in fp32 can be written in half precision, which costs its rounding."""
    half = adapted(adapter_dtype="bfloat16")
    reader = written(half, tmp_path / "bf16")
    assert {each.tensor_type for each in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    model = adapted()
    reader = written(model, tmp_path / "f16", dtype="f16")
    assert {each.tensor_type for each in reader.tensors} == {gguf.GGMLQuantizationType.F16}
    assert_same(deltas(reader), expected(model), 2e-3)


def test_targets_of_rank_zero_are_left_out(tmp_path: Path) -> None:
    """The others are there; and if none is left, nothing is written."""
    model = adapted(rank_pattern={"*.layers.0.*": 0})
    reader = written(model, tmp_path)
    wanted = {name: delta for name, delta in expected(model).items() if name.startswith("blk.1.")}
    assert_same(deltas(reader), wanted)
    with pytest.raises(tunerkit.errors.FileError, match="each of its targets has rank 0"):
        written(adapted(rank_pattern={"*": 0}), tmp_path / "none")
    assert not (tmp_path / "none" / "adapter.gguf").exists()


def test_a_padding_token_stays_as_it_is(tmp_path: Path) -> None:
    """Nothing is added at ``padding_idx``, so that row of llama.cpp's embedding has no delta either."""
    model = adapted(causal_lm(pad_token_id=2), targets=["embed_tokens"])
    wanted = expected(model)["token_embd.weight"].clone()
    assert wanted[:, 2].any()
    wanted[:, 2] = 0
    assert_same(deltas(written(model, tmp_path)), {"token_embd.weight": wanted})


def test_q_and_k_of_qwen_keep_their_rows(tmp_path: Path) -> None:
    """llama.cpp permutes them for the Llama family alone."""
    model = adapted(causal_lm("qwen2"), targets=["q_proj"])
    found = deltas(written(model, tmp_path))
    products = factors_of(tunerkit.tuner(model))
    wanted = {f"blk.{i}.attn_q.weight": products[f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1)}
    assert_same(found, {name: product.p @ product.q for name, product in wanted.items()})


def test_the_bare_model_without_a_head_can_be_written(tmp_path: Path) -> None:
    """Its paths lack the first part."""
    model = adapted(causal_lm().model)
    assert_same(deltas(written(model, tmp_path)), {
        name: delta for name, delta in expected(adapted()).items()
    })  # fmt: skip


@attrs.frozen
class Refused:
    """An adapter that GGUF cannot hold, and what the message names."""

    config: Mapping[str, Any]
    named: str


@pytest.mark.parametrize(
    "case",
    [
        Refused({"train_modules": ["lm_head"]}, "modules trained in full.*lm_head.*keep_merged=True"),
        Refused({"train_modules": ["norm"]}, "modules trained in full.*model.norm"),
        Refused({"bias": "all"}, "trained biases.*q_proj.*keep_merged=True"),
    ],
    ids=["head", "norm", "biases"],
)
def test_what_a_file_cannot_hold_is_refused_by_name(case: Refused, tmp_path: Path) -> None:
    """Instead of leaving it out."""
    model = adapted(causal_lm(attention_bias=True), **case.config)
    with pytest.raises(tunerkit.errors.FileError, match=f"(?s){case.named}"):
        tunerkit.export(model, tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def test_a_target_that_llama_cpp_does_not_adapt_is_refused_by_name(tmp_path: Path) -> None:
    """A classifier's head has no name in llama.cpp."""
    config = causal_lm().config
    config.num_labels = 3
    model = adapted(transformers.LlamaForSequenceClassification(config), targets=["q_proj", "score"])
    with pytest.raises(tunerkit.errors.FileError, match=r"not score\..*convert_hf_to_gguf"):
        written(model, tmp_path)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_one_of_a_tied_pair_is_refused_with_the_way_out(target: str, tmp_path: Path) -> None:
    """llama.cpp has no weight for the head then, and ends the process when the embedding has a pair."""
    model = adapted(targets=["q_proj", target])
    model.config.tie_word_embeddings = True
    with pytest.raises(tunerkit.errors.FileError, match=f"head of this model is its embedding.*{target}.*exclude"):
        written(model, tmp_path)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3_text", "mixtral", "phi3"])
def test_other_architectures_are_refused_by_name(model_type: str, tmp_path: Path) -> None:
    """With those that are supported, and with what to do."""
    model = adapted(targets=["head"], model=Headed(model_type))
    with pytest.raises(
        tunerkit.errors.FileError, match=f"llama, mistral, qwen2, qwen3.*'{model_type}'.*keep_merged=True"
    ):
        written(model, tmp_path)


class Headed(nn.Module):
    """A module with a config of some architecture, as far as this plugin looks."""

    def __init__(self, model_type: str) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.config = transformers.AutoConfig.for_model(model_type)


def test_a_model_without_a_config_is_refused(tmp_path: Path) -> None:
    """The message names its class."""
    model = adapted(nn.Sequential(nn.Linear(3, 2)), targets=["0"])
    with pytest.raises(tunerkit.errors.FileError, match="this Sequential has model_type None"):
        written(model, tmp_path)


def test_numbers_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    """Instead of writing infinities."""
    model = adapted()
    for adapter in tunerkit.tuner(model).adapters().values():
        adapter.get_parameter("b").data *= 1e6
    with pytest.raises(tunerkit.errors.FileError, match="lora_b has NaN or inf in f16: use dtype='f32'"):
        written(model, tmp_path, dtype="f16")
    written(model, tmp_path)
