"""New modules, such as the head of a classifier on a base checkpoint: trained as copies by default, and said."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit.errors import TunerkitWarning

if TYPE_CHECKING:
    from tests.support.toys import Toys

transformers = pytest.importorskip("transformers")  # untyped: its configs take any keyword


pytestmark = pytest.mark.usefixtures("toys")

IDS = torch.arange(6).reshape(2, 3)
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
Load = Callable[..., Any]


def checkpoint(folder: Path, model: Any) -> Load:
    """Write ``model``, and return what loads it as another class of transformers."""
    model.save_pretrained(folder)
    return lambda kind, **options: getattr(transformers, kind).from_pretrained(folder, **options).eval()


@pytest.fixture
def bert(tmp_path: Path) -> Load:
    """A checkpoint of BERT's body, with its pooler."""
    return checkpoint(tmp_path / "bert", transformers.BertModel(transformers.BertConfig(**SIZES)))


@pytest.fixture
def masked(tmp_path: Path) -> Load:
    """A checkpoint of a masked language model, which has no pooler."""
    return checkpoint(tmp_path / "masked", transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)))


def llama(folder: Path, *, tied: bool) -> Load:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied)
    return checkpoint(folder / "llama", transformers.LlamaForCausalLM(config))


@pytest.fixture
def longer(tmp_path: Path) -> Callable[[], Any]:
    """Loads a Llama with one layer more than its checkpoint has: ``model.layers.1``."""
    load = llama(tmp_path, tied=False)
    return lambda: load("LlamaForCausalLM", num_hidden_layers=2)


def wrapped(model: Any, **config: object) -> tuple[list[str], list[str]]:
    """Wrap ``model``, and return the paths of what is trained in full, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tunerkit.wrap(model, "toy-low-rank", config)
    assert all(each.category is TunerkitWarning and each.filename == __file__ for each in caught)
    texts = [str(each.message) for each in caught]
    assert not any("\n" in text for text in texts)
    return [target.path for target in tunerkit.tuner(model).copies], texts


def test_a_new_head_is_trained_and_its_adapter_loads_onto_another_base(
    toys: "Toys", bert: Load, tmp_path: Path
) -> None:
    """The next process has another random head. The file holds the trained one, so it fits."""
    model = bert("BertForSequenceClassification")
    copies, texts = wrapped(model)
    assert copies == ["classifier"]
    assert [text.startswith("trained in full, as copies") for text in texts] == [True]
    assert "classifier (34 parameters)" in texts[0]
    toys.fill_(model)
    tunerkit.save(model, tmp_path / "out")
    torch.manual_seed(5)
    again = bert("BertForSequenceClassification")
    assert not torch.equal(again.classifier.weight, tunerkit.unwrap(copy.deepcopy(model)).classifier.weight)
    tunerkit.load(again, tmp_path / "out")
    assert toys.close(again(IDS).logits, model(IDS).logits)


def test_a_head_from_the_checkpoint_stays_frozen_in_silence(bert: Load, tmp_path: Path) -> None:
    """Every parameter was loaded, so nothing is new."""
    whole = checkpoint(tmp_path / "whole", bert("BertForSequenceClassification"))
    assert wrapped(whole("BertForSequenceClassification")) == ([], [])


def test_a_head_of_another_size_is_new(bert: Load, tmp_path: Path) -> None:
    """``ignore_mismatched_sizes`` replaces the checkpoint's head."""
    whole = checkpoint(tmp_path / "whole", bert("BertForSequenceClassification"))
    copies, _ = wrapped(whole("BertForSequenceClassification", num_labels=5, ignore_mismatched_sizes=True))
    assert copies == ["classifier"]


def test_everything_outside_the_blocks_that_is_new_counts(masked: Load, tmp_path: Path) -> None:
    """A pooler that the checkpoint lacks, a head of several layers, and a head that the user's own class adds."""
    assert wrapped(masked("BertForSequenceClassification"))[0] == ["bert.pooler", "classifier"]
    roberta = checkpoint(tmp_path / "roberta", transformers.RobertaModel(transformers.RobertaConfig(**SIZES)))
    assert wrapped(roberta("RobertaForSequenceClassification"))[0] == ["classifier"]
    own: Any = nn.Module()
    own.body, own.top = masked("BertModel", add_pooling_layer=False), nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2))
    assert wrapped(own)[0] == ["top.0", "top.1"]


def test_a_new_head_of_a_timm_model_is_trained() -> None:
    """It is new where the checkpoint has another number of classes; otherwise nothing shows it."""
    timm = pytest.importorskip("timm")
    copies, texts = wrapped(timm.create_model("test_vit", num_classes=3), targets=["qkv"])
    assert copies == ["head"]
    assert "because timm.create_model did not load their values: head" in texts[0]
    assert wrapped(timm.create_model("test_vit"), targets=["qkv"]) == ([], [])
    named = {"targets": ["qkv"], "exclude": ["head"]}
    assert wrapped(timm.create_model("test_vit", num_classes=3), **named) == ([], [])


@pytest.mark.parametrize(
    "config",
    [
        {"train_modules": ["classifier"]},
        {"exclude": ["classifier"]},
        {"targets": ["query", "classifier"]},
    ],
)
def test_a_user_who_names_the_head_decides(bert: Load, config: dict[str, Any]) -> None:
    """Named anywhere, it is what the user says, in silence."""
    assert wrapped(bert("BertForSequenceClassification"), **config) == (config.get("train_modules", []), [])


def test_naming_modules_to_train_replaces_the_choice(masked: Load) -> None:
    """What is new and not named stays frozen, and a warning says so."""
    copies, texts = wrapped(masked("BertForSequenceClassification"), train_modules=["classifier"])
    assert copies == ["classifier"]
    assert len(texts) == 1
    assert "stay frozen: train_modules does not name bert.pooler" in texts[0]
    named = {"train_modules": ["classifier"], "exclude": ["pooler"]}
    assert wrapped(masked("BertForSequenceClassification"), **named) == (["classifier"], [])


@pytest.mark.parametrize("made", ["from a config", "deep copy"])
def test_without_marks_one_warning_names_the_head(bert: Load, made: str) -> None:
    """It cannot be seen whether the head is new; naming it anywhere silences the warning."""
    config = transformers.BertConfig(**SIZES)

    def model() -> Any:
        if made == "deep copy":
            return copy.deepcopy(bert("BertForSequenceClassification"))
        return transformers.BertForSequenceClassification(config)

    copies, texts = wrapped(model())
    assert copies == []
    assert len(texts) == 1
    assert "classifier may be newly initialized" in texts[0]
    assert "train_modules=['classifier']" in texts[0]
    for config_ in ({"train_modules": ["classifier"]}, {"exclude": ["classifier"]}):
        assert wrapped(model(), **config_)[1] == []


def test_models_without_a_head_for_a_task_do_not_warn(bert: Load, tmp_path: Path) -> None:
    """The head of a language model is in its checkpoint, a body has none, and other libraries set no marks."""
    assert wrapped(transformers.BertModel(transformers.BertConfig(**SIZES))) == ([], [])
    assert wrapped(copy.deepcopy(llama(tmp_path, tied=False)("LlamaForCausalLM"))) == ([], [])
    own = nn.Sequential(nn.Linear(3, 3))
    own.add_module("head", nn.Linear(3, 2))
    assert wrapped(own, targets=["0"]) == ([], [])


def test_marks_that_are_missing_inside_the_blocks_prove_nothing(bert: Load) -> None:
    """Moving or replacing parameters removes their marks, so the head's missing one could mean either."""
    model = bert("BertForSequenceClassification")
    layer = model.bert.encoder.layer[0].attention.self.query
    layer.weight = nn.Parameter(layer.weight.detach())
    copies, texts = wrapped(model)
    assert copies == []
    assert len(texts) == 1
    assert "classifier may be newly initialized" in texts[0]


def test_a_second_adapter_uses_the_head_that_the_first_one_trains(bert: Load) -> None:
    """Alone it trains a head of its own, as the first did."""
    model = bert("BertForSequenceClassification")
    wrapped(model)
    tunerkit.wrap(model, "toy-low-rank", adapter="beside")
    assert not tunerkit.tuner(model, "beside").copies
    tunerkit.activate(model, [])
    tunerkit.wrap(model, "toy-low-rank", adapter="alone")
    assert [target.path for target in tunerkit.tuner(model, "alone").copies] == ["classifier"]


def test_added_tokens_are_trained_with_their_output_embeddings(toys: "Toys", tmp_path: Path) -> None:
    """Their rows are random in each process, so without a copy the adapter would load nowhere."""
    load = llama(tmp_path, tied=False)

    def longer() -> Any:
        model = load("LlamaForCausalLM")
        model.resize_token_embeddings(24)
        return model

    model = longer()
    copies, texts = wrapped(model)
    assert sorted(copies) == ["lm_head", "model.embed_tokens"]
    assert len(texts) == 1
    toys.fill_(model)
    tunerkit.save(model, tmp_path / "out")
    torch.manual_seed(5)
    again = tunerkit.load(longer(), tmp_path / "out")
    assert toys.close(again(IDS + 15).logits, model(IDS + 15).logits)
    assert wrapped(longer(), exclude=["embed_tokens", "lm_head"]) == ([], [])


def test_added_tokens_of_tied_embeddings_are_named_as_frozen(tmp_path: Path) -> None:
    """A tied weight cannot be copied; the message says how the saved adapter finds the same rows."""
    model = llama(tmp_path, tied=True)("LlamaForCausalLM")
    model.resize_token_embeddings(24)
    copies, texts = wrapped(model)
    assert copies == []
    assert len(texts) == 1
    assert "stay frozen: 'model.embed_tokens' cannot be trained in full" in texts[0]
    assert "save the base before you wrap it" in texts[0]


def test_a_part_that_is_new_is_named_as_frozen(bert: Load) -> None:
    """The bias of a masked head is new, and the module that holds it also holds the tied, loaded decoder."""
    copies, texts = wrapped(bert("BertForMaskedLM"))
    assert copies == ["cls.predictions.transform"]
    assert "only a part of cls.predictions is new" in texts[1]


def test_offloaded_parameters_prove_nothing(bert: Load) -> None:
    """Offloading replaces parameters; the rest of the model still shows what was loaded."""
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("tunerkit_distributed", reason="it knows accelerate's hooks")
    model = bert("BertForSequenceClassification")
    accelerate.cpu_offload(model.bert.encoder, execution_device=torch.device("cpu"))
    assert wrapped(model)[0] == ["classifier"]


@pytest.mark.parametrize("kind", ["MllamaForCausalLM", "MarianMTModel"])
def test_what_the_class_itself_adds_or_computes_is_not_new(kind: str, tmp_path: Path) -> None:
    """Mllama builds more embeddings than its vocabulary has; Marian computes its positions and saves none."""
    cls: Any = getattr(transformers, kind)
    layers = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 20}
    mllama = SIZES | {"num_key_value_heads": 2, "cross_attention_layers": []}
    config = cls.config_class(pad_token_id=0, **(layers | heads if kind == "MarianMTModel" else mllama))
    load = checkpoint(tmp_path / "base", cls(config))
    assert wrapped(load(kind), targets=["q_proj"])[0] == []


def test_new_cross_attention_in_every_block_is_trained(toys: "Toys", bert: Load, tmp_path: Path) -> None:
    """The decoder's checkpoint has no cross-attention. Its trained values, keys included, load onto other random ones.

    Single layers are copied: a copy of the whole attention would add its keys and values to the cache a second time.
    """
    gpt = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=8)
    transformers.GPT2LMHeadModel(gpt).save_pretrained(tmp_path / "gpt")

    def pair() -> Any:
        build = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained
        return build(tmp_path / "bert", tmp_path / "gpt").eval()

    def output(model: Any) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=IDS, decoder_input_ids=IDS).logits
        return logits

    model = pair()
    copies, texts = wrapped(model, targets=["query", "decoder*c_fc"])
    attention = [f"decoder.transformer.h.{block}.crossattention" for block in (0, 1)]
    layers = [f"{path}.{name}" for path in attention for name in ("c_attn", "q_attn", "c_proj")]
    assert sorted(copies) == sorted([*layers, *(f"decoder.transformer.h.{block}.ln_cross_attn" for block in (0, 1))])
    assert len(texts) == 1
    assert all(f"{path} (1,088 parameters)" in texts[0] for path in attention)
    assert "2,240 parameters in all" in texts[0]
    toys.fill_(model)
    tunerkit.save(model, tmp_path / "out")
    torch.manual_seed(5)
    assert toys.close(output(tunerkit.load(pair(), tmp_path / "out")), output(model))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_a_whole_block_that_is_new_is_trained(
    toys: "Toys", longer: Callable[[], Any], targets: Any, tmp_path: Path
) -> None:
    """More layers than the checkpoint has: a name that is in every block says nothing about the new one."""
    model = longer()
    names = sorted(f"model.layers.1.{name.removesuffix('.weight')}" for name in model.model.layers[1].state_dict())
    copies, texts = wrapped(model, targets=targets)
    assert sorted(copies) == names
    assert texts[0].count("model.layers.1 (") == 1
    assert not any(target.path.startswith("model.layers.1.") for target in tunerkit.tuner(model).targets)
    toys.fill_(model)
    tunerkit.save(model, tmp_path / "out")
    torch.manual_seed(5)
    assert toys.close(tunerkit.load(longer(), tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_parameters_of_a_new_block_that_are_in_no_layer_are_named_as_frozen(tmp_path: Path) -> None:
    """Experts are one layer, with an activation inside; the scales of BEiT's blocks lie beside the block's layers."""
    mixtral = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2)
    load = checkpoint(tmp_path / "mixtral", transformers.MixtralForCausalLM(mixtral))
    copies, texts = wrapped(load("MixtralForCausalLM", num_hidden_layers=2), targets=["q_proj"])
    assert {"model.layers.1.mlp.experts", "model.layers.1.mlp.gate"} <= {*copies}
    assert [text.startswith("trained in full") for text in texts] == [True]
    image = {**SIZES, "image_size": 8, "patch_size": 4, "layer_scale_init_value": 0.1}
    load = checkpoint(tmp_path / "beit", transformers.BeitModel(transformers.BeitConfig(**image)))
    copies, texts = wrapped(load("BeitModel", num_hidden_layers=2))
    assert len(copies) == 8
    assert "stay frozen: layers.1 has its own parameters beside its layers" in texts[1]


def test_excluded_layers_of_a_new_block_stay_frozen_and_the_others_are_trained(longer: Callable[[], Any]) -> None:
    """Leaving one projection out of LoRA does not freeze the random layers around it; naming the block does."""
    copies, _ = wrapped(longer(), exclude=["down_proj"])
    assert "model.layers.1.mlp.up_proj" in copies
    assert "model.layers.1.mlp.down_proj" not in copies
    assert wrapped(longer(), exclude=["layers.1"]) == ([], [])


def test_new_parts_of_layers_in_blocks_are_named_as_frozen(tmp_path: Path) -> None:
    """A config that asks for biases which the checkpoint lacks."""
    model = llama(tmp_path, tied=False)("LlamaForCausalLM", attention_bias=True)
    copies, texts = wrapped(model)
    assert copies == []
    assert len(texts) == 1
    assert "only a part of model.layers.0.self_attn.q_proj is new" in texts[0]


def _copied(model: Any) -> None:
    """A block from copies of a loaded one, as in depth up-scaling."""
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))


def _cast(model: Any) -> None:
    """The same projection of every block in a new Parameter."""
    for layer in model.model.layers:
        layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.detach().double().float())


def _exchanged(model: Any) -> None:
    """Every block's projection in a layer of the user's own, which starts with random values in place."""
    for layer in model.model.layers:
        old, layer.mlp.up_proj = layer.mlp.up_proj, nn.Linear(16, 16, bias=False)
        layer.mlp.up_proj.load_state_dict(old.state_dict())


def _trained(model: Any) -> None:
    """A copied block, after a training that wrote to every parameter in place."""
    _copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


@pytest.mark.parametrize("replace_", [_copied, _cast, _exchanged, _trained])
def test_base_layers_whose_marks_were_dropped_stay_frozen_with_a_warning(
    replace_: Callable[[Any], None], tmp_path: Path
) -> None:
    """However regular the places are, nothing shows that ``from_pretrained`` filled these parameters at random."""
    model = llama(tmp_path, tied=False)("LlamaForCausalLM")
    replace_(model)
    copies, texts = wrapped(model)
    assert copies == []
    assert len(texts) == 1
    assert "may be newly initialized, which cannot be determined" in texts[0]
    assert "It stays frozen" in texts[0]
