"""PEFT's config objects in `tunerkit.wrap`: the same places and parameters as in PEFT, or a refusal with what to do."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import tunerkit
from plugins.peft.tests.peft_models import CASES, TIED
from tunerkit.errors import ConfigError, UnknownMethodError
from tunerkit_peft.config_objects import settings_of

pytestmark = pytest.mark.usefixtures("no_other_types")

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
METHODS: Mapping[str, Callable[..., Any]] = {"lora": peft.LoraConfig, "adalora": peft.AdaLoraConfig}
BRANCHED = r".*layers\.[01]\.self_attn\.(q|v)_proj"


def llama() -> nn.Module:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=40, num_hidden_layers=3, **SIZES))


def roberta() -> nn.Module:
    torch.manual_seed(0)
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(vocab_size=40, num_hidden_layers=2, **SIZES))


def bert_answers() -> nn.Module:
    torch.manual_seed(0)
    return hf.BertForQuestionAnswering(hf.BertConfig(vocab_size=40, num_hidden_layers=2, **SIZES))


class Block(nn.Module):
    """Two layers, which have numbers of their own inside a numbered block."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))


class Nested(nn.Module):
    """Blocks of layers: a path has two numbers. It is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))


class Plain(nn.Module):
    """A body in a list, and a head of two layers. It is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


SAME: Mapping[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "defaults of PEFT": (llama, "lora", {}),
    "all-linear": (llama, "lora", {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "lora_dropout": 0.1}),
    "patterns": (
        llama,
        "lora",
        {
            "target_modules": BRANCHED,
            "rank_pattern": {"q_proj": 3, r"layers\.1.*v_proj": 5},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 2.5},
        },
    ),
    "layers": (llama, "lora", {"target_modules": ["q_proj"], "layers_to_transform": 1, "exclude_modules": ["k_proj"]}),
    "layers by pattern": (
        llama,
        "lora",
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    ),
    "inner layers by pattern": (
        Nested,
        "lora",
        {"target_modules": ["0"], "layers_to_transform": [1], "layers_pattern": ["layers"]},
    ),
    "excluded": (llama, "lora", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"}),
    "a module in full": (llama, "lora", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "biases": (roberta, "lora", {"target_modules": ["query"], "bias": "lora_only", "use_rslora": True}),
    "classifying": (roberta, "lora", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "classifying, defaults": (roberta, "lora", {"task_type": "SEQ_CLS", "init_lora_weights": "gaussian"}),
    "classifying, all": (roberta, "lora", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "all, without a task": (roberta, "lora", {"target_modules": "all-linear"}),
    "all, with a part in full": (roberta, "lora", {"target_modules": "all-linear", "modules_to_save": ["out_proj"]}),
    "all of a model of torch": (Plain, "lora", {"target_modules": "ALL-LINEAR"}),
    "attention of torch": (CASES["attention"].build, "lora", {"target_modules": ["attention"], "r": 3}),
    "attention of torch, without its output": (
        CASES["attention"].build,
        "lora",
        {"target_modules": ["attention", "last"], "exclude_modules": ["out_proj", "last"]},
    ),
    "attention of torch, left out": (
        CASES["attention"].build,
        "lora",
        {"target_modules": ["attention", "first"], "exclude_modules": ["attention"]},
    ),
    "tying without a tie": (llama, "lora", {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}),
    "tying of nothing": (TIED.build, "lora", {"target_modules": ["q_proj"], "ensure_weight_tying": True}),
    "answering": (bert_answers, "lora", {"target_modules": ["query"], "task_type": "QUESTION_ANS"}),
    "a language model": (llama, "lora", {"task_type": peft.TaskType.CAUSAL_LM}),
    "AdaLoRA": (llama, "adalora", {"total_step": 100, "tinit": 10, "tfinal": 20, "target_modules": ["q_proj"]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAME)
def test_the_same_modules_are_adapted_and_trained_in_full(name: str) -> None:
    """As many parameters too; for AdaLoRA as well, whose ranks are the initial ones in both. PEFT is the oracle."""
    build, method, given = SAME[name]
    config = METHODS[method](**given)
    before = copy.deepcopy(config)
    model = tunerkit.wrap(build(), method, config)
    assert config == before
    theirs = peft.get_peft_model(build(), METHODS[method](**given))
    named = {path.replace(".base_layer.out_proj", ".out_proj"): module for path, module in theirs.named_modules()}
    modules = {path.removeprefix("base_model.model."): module for path, module in named.items()}
    adapted = {path for path, each in modules.items() if isinstance(each, peft.tuners.tuners_utils.BaseTunerLayer)}
    copied = {path for path, each in modules.items() if isinstance(each, peft.utils.other.ModulesToSaveWrapper)}
    tuner = tunerkit.tuner(model)
    assert {target.path for target in tuner.targets} == adapted
    assert {target.path for target in tuner.copies} == copied
    assert trained(model) == trained(theirs)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_is_pefts(rslora: bool) -> None:
    """PEFT's default alpha is 8, and tunerkit's twice the rank: what counts is what PEFT would train."""
    given: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 3}}
    config = peft.LoraConfig(use_rslora=rslora, **given)
    model, theirs = tunerkit.wrap(llama(), "lora", config), peft.get_peft_model(llama(), config)
    for path, adapter in tunerkit.tuner(model).adapters().items():
        other: Any = theirs.get_submodule(f"base_model.model.{path}")
        assert adapter.scale == pytest.approx(other.scaling["default"], rel=1e-12)


@pytest.mark.parametrize("rslora", [False, True])
def test_attention_of_torch_computes_what_pefts_does(rslora: bool) -> None:
    """From the same A and B, by patterns of its own: PEFT applies the product of the second projection twice."""
    case = CASES["attention"]
    given: dict[str, Any] = {"r": 2, "rank_pattern": {"attention": 3}, "alpha_pattern": {"attention": 5}}
    config = peft.LoraConfig(target_modules=["attention", "first"], use_rslora=rslora, **given)
    ours, theirs = tunerkit.wrap(case.build(), "lora", config), peft.get_peft_model(case.build(), config)
    with torch.no_grad():
        for path, adapter in tunerkit.tuner(ours).adapters().items():
            place = path.replace(".out_proj", ".base_layer.out_proj")
            layer: Any = theirs.get_submodule(f"base_model.model.{place}")
            for name, other in (("a", layer.lora_A["default"].weight), ("b", layer.lora_B["default"].weight)):
                values = torch.linspace(-1, 1, other.numel()).reshape(other.shape).sin()
                adapter.get_parameter(name).copy_(other.copy_(values))
        outputs = [case.output(ours), case.output(theirs)]
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-5 * outputs[1].abs().max()


def test_a_new_head_is_trained_in_full_by_all_linear(tmp_path: Path) -> None:
    """A head that the checkpoint lacks is new; PEFT would adapt its random values, and save them nowhere."""
    hf.RobertaModel(hf.RobertaConfig(vocab_size=40, num_hidden_layers=1, **SIZES)).save_pretrained(tmp_path)
    base = hf.RobertaForSequenceClassification.from_pretrained(tmp_path)
    with pytest.warns(tunerkit.TunerkitWarning, match="trained in full"):
        tuner = tunerkit.tuner(tunerkit.wrap(base, "lora", peft.LoraConfig(target_modules="all-linear")))
    assert {copy.path for copy in tuner.copies} == {"classifier"}
    assert not any(target.path.startswith("classifier") for target in tuner.targets)


@pytest.mark.parametrize(
    "given", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "embed_tokens"]}], ids=str
)
def test_one_adapter_for_both_sides_of_a_tie_is_refused(given: dict[str, Any]) -> None:
    """Both sides are named, with the setting that names them, and that each trains on its own."""
    (field,) = given
    config = peft.LoraConfig(**{"target_modules": ["q_proj"], **given}, ensure_weight_tying=True)
    words = rf"PEFT trains 'model.embed_tokens', 'lm_head' as one; .* name all of them in {field}"
    with pytest.raises(ConfigError, match=words):
        tunerkit.wrap(TIED.build(), "lora", config)


def test_adalora_with_dora_is_refused_as_pefts_own_words_do() -> None:
    """PEFT's AdaLoRA has none: it refuses such a config when it is built, and ignores one that is set later."""
    config = peft.AdaLoraConfig(total_step=10, target_modules=["q_proj"])
    config.use_dora = True
    with pytest.raises(ConfigError, match="PEFT's AdaLoRA does not have it; leave it out @"):
        tunerkit.wrap(llama(), "adalora", config)


def test_a_second_adapter_is_placed_as_the_first() -> None:
    """The copies and adapters of the first one are no modules of the base."""
    config = peft.LoraConfig(target_modules=["query", "dense"], task_type="SEQ_CLS")
    model = tunerkit.wrap(roberta(), "lora", config)
    tunerkit.activate(model, [])
    tunerkit.wrap(model, "lora", config, adapter="second")
    first, second = (tunerkit.tuner(model, name) for name in ("default", "second"))
    for one, other in ((first.targets, second.targets), (first.copies, second.copies)):
        assert [place.path for place in one] == [place.path for place in other] != []
    assert first.config == second.config


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({"init_lora_weights": "pissa"}, {"start": "pissa"}),
        ({"init_lora_weights": "pissa_niter_16"}, {"start": "pissa"}),
        ({"init_lora_weights": "olora"}, {"start": "olora"}),
        ({"init_lora_weights": "eva"}, {"start": "eva", "rho": 2.0}),
        ({"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=1.0)}, {"start": "eva", "rho": 1.0}),
    ],
)
def test_pefts_starts_are_ours(given: dict[str, Any], settings: dict[str, Any]) -> None:
    """Law: the object's start is the setting's, with EVA's bound of the ranks."""
    model = tunerkit.wrap(llama(), "lora", peft.LoraConfig(r=4, target_modules=["q_proj"], **given))
    found = tunerkit.unstructure(tunerkit.tuner(model).config)
    assert {name: found[name] for name in settings} == settings


def test_adaloras_schedule_is_kept() -> None:
    """In steps, as it was given, with PEFT's regulariser and start."""
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, tinit=10, tfinal=20, deltaT=5, beta1=0.7, beta2=0.8, orth_reg_weight=0.25, total_step=100
    )
    model = tunerkit.wrap(llama(), "AdaLoRA", config)
    found = tunerkit.unstructure(tunerkit.tuner(model).config)
    assert found == {
        **found,
        **{"init_rank": 6, "target_rank": 2, "t_init": 10, "t_final": 20, "delta_t": 5, "beta1": 0.7, "beta2": 0.8},
        **{"gamma": 0.25, "total_steps": 100, "start": "gaussian", "orthogonality": "reference", "alpha": 8.0},
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_dora": True}, "'use_dora' is True: DoRA, which also scales the base weight; leave it out, or train it"),
        ({"lora_bias": True}, "'lora_bias' is True: a bias in lora_B"),
        ({"init_lora_weights": "corda"}, "'init_lora_weights' is 'corda'; write init_lora_weights=True, or .*'pissa'"),
        ({"init_lora_weights": "loftq"}, r"'init_lora_weights' is 'loftq', .*'start': 'loftq', 'original'"),
        ({"init_lora_weights": "eva", "eva_config": peft.EvaConfig(whiten=True)}, "'eva_config.whiten' is True"),
        ({"init_lora_weights": False}, "'init_lora_weights' is False"),
        ({"inference_mode": True}, r"'inference_mode' is True, .*tunerkit\.freeze\(model, 'default'\)"),
        (
            {"trainable_token_indices": [1]},
            r"wrap once more: tunerkit\.wrap\(model, 'trainable-tokens', {'tokens': \[1\]}, adapter='tokens'\)",
        ),
        (
            {"trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [2]}},
            r"'targets': \['embed_tokens'\]}, adapter='tokens'\) and .*'targets': \['lm_head'\]}, adapter='tokens1'\)",
        ),
        ({"target_parameters": ["experts.w"]}, "'target_parameters'"),
        ({"lora_dropout": 1.0}, "'lora_dropout' is 1.0; expected a number from 0 and below 1"),
        ({"r": 0.5}, "'r' is 0.5; expected an integer from 1"),
        ({"target_modules": [1]}, r"'target_modules' is \[1\]; expected a list of names, or a regular expression"),
        ({"exclude_modules": 5}, "'exclude_modules' is 5; expected a list of names"),
        ({"layers_to_transform": 1.5}, "expected int, got float 1.5"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_another_training_is_refused_with_what_to_do(given: dict[str, Any], message: str) -> None:
    """The model is unchanged."""
    model, config = llama(), peft.LoraConfig(target_modules=["q_proj"])
    for name, value in given.items():  # PEFT refuses some of them when the object is built, others not
        setattr(config, name, value)
    keys = [*model.state_dict()]
    with pytest.raises(ConfigError, match=message):
        tunerkit.wrap(model, "lora", config)
    assert [*model.state_dict()] == keys


def test_all_refusals_are_in_one_error() -> None:
    """So that the user changes the object once."""
    config = peft.LoraConfig(
        target_modules=["q_proj"], init_lora_weights="orthogonal", inference_mode=True, use_dora=True
    )
    with pytest.raises(ConfigError) as raised:
        tunerkit.wrap(llama(), "lora", config)
    assert len(raised.value.problems) == 3


def test_masks_of_an_earlier_training_are_refused() -> None:
    """They stand in the config of a folder, which is loaded instead."""
    config = peft.AdaLoraConfig(total_step=10, target_modules=["q_proj"], rank_pattern={"a.lora_E": [True]})
    with pytest.raises(ConfigError, match=r"tunerkit\.load\(model, folder, trainable=True\)"):
        tunerkit.wrap(llama(), "adalora", config)


def test_a_model_without_default_targets_asks_for_them() -> None:
    """As PEFT does."""
    with pytest.raises(ConfigError, match="'target_modules' is missing, and PEFT has no default for a model of type"):
        tunerkit.wrap(nn.Sequential(nn.Linear(2, 2)), "lora", peft.LoraConfig())


@pytest.mark.parametrize(("method", "config"), [("lora", "adalora"), ("adalora", "lora")])
def test_another_method_is_refused_with_the_line_to_write(method: str, config: str) -> None:
    """And that line works."""
    given: dict[str, Any] = {"target_modules": ["q_proj"], **({"total_step": 10} if config == "adalora" else {})}
    made = METHODS[config](**given)
    words = rf"this {type(made).__name__} describes method '{config}', got '{method}'; write wrap\(model, '{config}', "
    with pytest.raises(ConfigError, match=words):
        tunerkit.wrap(llama(), method, made)
    tunerkit.wrap(llama(), config, made)


def test_a_config_without_a_method_says_where_it_goes() -> None:
    """As ``get_peft_model(model, config)`` has it."""
    with pytest.raises(UnknownMethodError, match=r"the name comes before the config: tunerkit\.wrap\(model, 'lora', c"):
        tunerkit.wrap(llama(), peft.LoraConfig())  # type: ignore[arg-type]


def test_configs_of_other_methods_are_none_of_ours() -> None:
    """They are refused as any other object is, or by the name of the distribution that would bring the method."""
    assert settings_of(peft.PromptTuningConfig(num_virtual_tokens=4), llama()) is None
    assert settings_of(object(), llama()) is None
    with pytest.raises(ConfigError, match="takes LoraConfig, a mapping or None, got PromptTuningConfig"):
        tunerkit.wrap(llama(), "lora", peft.PromptTuningConfig(num_virtual_tokens=4))
    with pytest.raises(ConfigError, match=r"VeraConfig is of a type that no installed method has.*tunerkit\[methods\]"):
        tunerkit.wrap(llama(), "lora", peft.VeraConfig())
