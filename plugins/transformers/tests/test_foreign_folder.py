"""The processor of another program's adapter: the tokenizer beside it, or the base's, and no code of either's."""

import json
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import nn

import tunerkit
from tests.support import toy_formats
from tests.support.trainer_toys import VOCABULARY, tokenizer
from tunerkit.plugin import Description, Foreign, Format
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_adapters import SCALE
from tunerkit_transformers.foreign_folder import load_foreign
from tunerkit_transformers.pretrained import ModelError, load_pretrained

CONFIG = "tokenizer_config.json"
TARGET = "model.layers.0.self_attn.q_proj"


class ToyFormat:
    """The toy format, whose adapters become ``toy-low-rank``, for a Llama."""

    @tunerkit.hookimpl
    def tunerkit_formats(self) -> Iterable[Format]:
        """Register it."""
        return [Format("toy", toy_formats.sniff, read, toy_formats.write, describe=described)]


def read(path: Path, model: nn.Module) -> Foreign:
    factors = toy_formats.read(path, model).factors
    tensors = {path: {"a": each.q, "b": each.p / SCALE} for path, each in factors.items()}
    return Foreign(factors, "toy-low-rank", tensors=tensors)


def described(path: Path) -> Description:
    return Description("LoRA", model_class="LlamaForCausalLM")


@pytest.fixture(autouse=True, scope="module")
def _formats(toys: Any) -> Iterator[None]:
    with registered(ToyFormat()):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(folder)
    tokenizer(folder).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The folder of an adapter."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "toy.json").write_text(json.dumps({TARGET: [[[0.1] * 8] * 2, [[0.2] * 2] * 8]}))
    return tmp_path / "adapter"


def bring_code(folder: Path) -> None:
    """Put a tokenizer into a folder whose class is in the folder; to import it leaves a file behind."""
    folder.mkdir(exist_ok=True)
    tokenizer(folder).save_pretrained(folder)
    settings = json.loads((folder / CONFIG).read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / CONFIG).write_text(json.dumps(settings))
    (folder / "own.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast as Own\n"
    )


@pytest.mark.parametrize("at", ["the adapter", "a file of it", "the run", "the base"])
def test_no_code_of_a_folder_is_run(at: str, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anybody asked: transformers would read the answer from the terminal."""
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    own = Path(shutil.copytree(base, adapter.parent / "base")) if at == "the base" else adapter
    bring_code(own)
    if at == "the base":
        with pytest.warns(tunerkit.TunerkitWarning, match=r"so None is in its place: \S"):
            assert load_foreign(str(adapter), str(own))[1] is None
    else:
        opened = adapter / ("toy.json" if at == "a file of it" else "")
        load = partial(load_pretrained, "causal-lm", str(base), processor_from=own)
        with pytest.raises(ModelError, match="it brings code of its own, which tunerkit does not run"):
            (load if at == "the run" else partial(load_foreign, str(opened), str(base)))()
    assert not (own / "ran").exists()


@pytest.mark.parametrize("name", ["", "toy.json"])
def test_a_file_is_opened_as_its_folder_is(name: str, base: Path, adapter: Path) -> None:
    """With the tokenizer beside it, or else the base's; a path here is never asked of the hub."""
    words: Any
    model, words = load_foreign(str(adapter / name), str(base))
    assert tunerkit.tuner(model).method == "toy-low-rank"
    assert len(words) == VOCABULARY
    grown = tokenizer(adapter)
    grown.add_tokens(["new"])
    grown.save_pretrained(adapter)
    model, words = load_foreign(str(adapter / name), str(base))
    embedding: Any = cast(Any, model).get_input_embeddings()
    assert len(words) == embedding.num_embeddings == VOCABULARY + 1


def test_a_damaged_tokenizer_beside_the_adapter_is_no_missing_one(base: Path, adapter: Path) -> None:
    """The base's may have other tokens. What is wrong is said, of the base's too, without which None is returned."""
    (adapter / CONFIG).write_text("{")
    with pytest.raises(ModelError, match=rf"tokenizer beside the adapter, from {CONFIG} in .*adapter: .*; fix it"):
        load_foreign(str(adapter), str(base))
    (adapter / CONFIG).rename(shutil.copytree(base, adapter.parent / "base") / CONFIG)
    (adapter.parent / "base" / "tokenizer.json").unlink()
    with pytest.warns(tunerkit.TunerkitWarning, match=r"so None is in its place: \S"):
        assert load_foreign(str(adapter), str(adapter.parent / "base"))[1] is None
