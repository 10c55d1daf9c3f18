"""Folders of other types than LoRA: read and written by the names that a method declares."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tunerkit
from plugins.peft.tests import peft_folders
from plugins.peft.tests.declaring import NAME, NAMES, Plugin
from plugins.peft.tests.peft_models import CASES, Case
from tunerkit_peft import declarations
from tunerkit_peft.reading import describe
from tunerkit_testing.registering import registered

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
TARGETS = {"llama": ("q_proj", "down_proj"), "bert": ("query", "dense"), "gpt2": ("c_attn", "c_fc")}
PLUGIN = Plugin(NAMES)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The method is installed, and of methods that declare PEFT's names it alone."""
    monkeypatch.setattr(declarations, "declarations", lambda: [(NAME, "VERA")])
    with registered(PLUGIN):
        yield


def config_of(**fields: Any) -> Any:
    """Peft's config."""
    return peft.VeraConfig(r=5, **fields)


def folder_of(path: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write a folder with these settings alone."""
    peft_folders.folder(path, {}, tensors)
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def randomize_(model: nn.Module) -> None:
    """Give all that is trained other values."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def theirs(case: Case, names: tuple[str, ...], folder: Path, **fields: Any) -> Tensor:
    """Let peft make an adapter and save it; the output of its model."""
    config = config_of(target_modules=list(names), **fields)
    model: Any = peft.get_peft_model(case.build(), config)  # type: ignore[arg-type]
    randomize_(model)
    model.save_pretrained(str(folder))
    with torch.no_grad():
        return case.output(model.eval())


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs are equal in fp32."""
    return bool((found - expected).abs().max() <= 2e-6 * expected.abs().max())


@pytest.mark.parametrize("at", TARGETS)
def test_a_folder_of_peft_is_read_and_written(tmp_path: Path, at: str) -> None:
    """Outputs equal peft's; what is written, peft and tunerkit load, with the same tensors."""
    case = CASES[at]
    expected = theirs(case, TARGETS[at], tmp_path / "theirs")
    model = tunerkit.load(case.build(), tmp_path / "theirs")
    assert tunerkit.tuner(model).method == NAME
    with torch.no_grad():
        assert close(case.output(model), expected)
        tunerkit.export(model, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(case.build(), str(tmp_path / "ours"))  # type: ignore[arg-type]
        assert close(case.output(again.eval()), expected)
        assert torch.equal(case.output(tunerkit.load(case.build(), tmp_path / "ours")), case.output(model))
    first, second = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "ours"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_adapter_of_ours_goes_to_peft(tmp_path: Path) -> None:
    """What tunerkit trained computes the same in peft."""
    case = CASES["llama"]
    model = tunerkit.wrap(case.build(), NAME, {"targets": ["k_proj", "up_proj"], "rank": 5}, seed=0)
    randomize_(model)
    written = tunerkit.export(model, tmp_path / "ours")
    assert json.loads((written / "adapter_config.json").read_text())["peft_type"] == "VERA"
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(case.build(), str(written))  # type: ignore[arg-type]
        assert close(case.output(again.eval()), case.output(model))


# --- Files that are damaged, or of something else ---------------------------------------------------------------------


def _without(held: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    kept = {key: each for key, each in held.items() if part not in key}
    assert len(kept) < len(held)
    return kept


def _changed(held: dict[str, Tensor], part: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    assert any(part in key for key in held)
    return {key: change(each) if part in key else each for key, each in held.items()}


MORE = peft_folders.PREFIX + "model.layers.0.mlp.down_proj.vera_lambda_c"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
# What is done to the tensors of a VeRA, and parts of the error.
DAMAGED: dict[str, tuple[Change, tuple[str, ...]]] = {
    "a tensor of one target": (
        lambda held: _without(held, "0.self_attn.q_proj.vera_lambda_b"),
        ("incomplete", "0.self_attn.q_proj.vera_lambda_d", "without its vera_lambda_b"),
    ),
    "a target": (lambda held: _without(held, "layers.1.self_attn.q_proj"), ("incomplete", "layers.1.self_attn.q_proj")),
    "a shared tensor": (lambda held: _without(held, "vera_A"), ("'vera_A', which all targets share, is missing",)),
    "a shape": (
        lambda held: _changed(held, "1.mlp.down_proj.vera_lambda_b", lambda each: each[:, None]),
        ("damaged or incomplete", "is [16, 1]; expected [out 16]"),
    ),
    "a rank": (
        lambda held: _changed(held, "lambda_d", lambda each: each[:3]),
        ("do not belong together", "has rank 3; 'r' says 5"),
    ),
    "the rank of what is shared": (lambda held: _changed(held, "vera_A", lambda each: each[:3]), ("[3, 24]",)),
    "a value": (lambda held: _changed(held, "1.mlp", lambda each: each * float("nan")), ("NaN",)),
    "a shared value": (lambda held: _changed(held, "vera_B", lambda each: each * float("inf")), ("inf",)),
    "a kind": (lambda held: _changed(held, "lambda_d", lambda each: each.int()), ("is of type I32",)),
    "a tensor more": (lambda held: {**held, MORE: torch.zeros(2)}, ("belong to nothing", "vera_lambda_c")),
    "everything": (lambda held: {"x": torch.zeros(2)}, ("holds no adapter", "'x'")),
}


@pytest.fixture(scope="module")
def vera(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of peft's VeRA on a Llama."""
    folder = tmp_path_factory.mktemp("vera")
    theirs(CASES["llama"], TARGETS["llama"], folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_folder_is_refused(tmp_path: Path, vera: Path, damage: str) -> None:
    """The error names the file and the tensor, and the model is unchanged."""
    change, parts = DAMAGED[damage]
    settings = json.loads((vera / "adapter_config.json").read_text())
    folder = folder_of(tmp_path, settings, change(load_file(vera / "adapter_model.safetensors")))
    peft_folders.refused(folder, *parts, model=CASES["llama"].build())


# The setting of a VeRA, its value, and parts of the error.
SETTINGS: list[tuple[str, Any, str]] = [
    ("r", "5", "settings that method 'example-vera' rejects"),
    ("r", 2.5, "settings that method 'example-vera' rejects"),
    ("save_projection", False, "computes what PEFT does with True"),
    ("save_projection", None, "computes what PEFT does with True"),
    ("bias", "lora_only", "expected 'none' or 'all' or 'vera_only'"),
    ("vera_droput", 0.5, "did you mean 'vera_dropout'"),
    ("use_qalora", True, "QA-LoRA"),
    ("modules_to_save", "head", "a list of names"),
]


@pytest.mark.parametrize(("name", "value", "part"), SETTINGS)
def test_a_setting_that_the_method_does_not_have_is_named(
    tmp_path: Path, vera: Path, name: str, value: Any, part: str
) -> None:
    """The error names the file, the setting, and what is right."""
    settings = json.loads((vera / "adapter_config.json").read_text())
    folder = folder_of(tmp_path, {**settings, name: value}, load_file(vera / "adapter_model.safetensors"))
    peft_folders.refused(folder, part, *(() if name == "r" else (f"'{name}'",)), model=CASES["llama"].build())


@pytest.mark.parametrize("name", ["r", "save_projection"])
def test_a_missing_setting_is_named(tmp_path: Path, vera: Path, name: str) -> None:
    """Nothing is guessed: neither a rank, nor that PEFT's older version computed the same."""
    settings = json.loads((vera / "adapter_config.json").read_text())
    del settings[name]
    folder = folder_of(tmp_path, settings, load_file(vera / "adapter_model.safetensors"))
    peft_folders.refused(folder, f"'{name}' is missing", model=CASES["llama"].build())


def test_a_shared_tensor_may_be_at_each_target_too(tmp_path: Path, vera: Path) -> None:
    """PEFT writes some of them so. With other values, nothing says which one counts."""
    held, settings = load_file(vera / "adapter_model.safetensors"), peft_folders.settings(vera)
    again = f"{peft_folders.PREFIX}model.layers.0.mlp.down_proj.vera_A"
    case = CASES["llama"]
    model = tunerkit.load(
        case.build(), folder_of(tmp_path, settings, {**held, again: held["base_model.vera_A"].clone()})
    )
    with torch.no_grad():
        assert torch.equal(case.output(model), case.output(tunerkit.load(case.build(), vera)))
    folder_of(tmp_path, settings, {**held, again: held["base_model.vera_A"] + 1})
    peft_folders.refused(tmp_path, again, "differ, and all targets share one", model=case.build())


def test_a_folder_is_described_without_a_model(vera: Path) -> None:
    """As `tunerkit show` prints it."""
    found = describe(vera)
    assert (found.method, set(found.ranks.values()), found.settings["rank"]) == (NAME, {5}, 5)
    assert "model.layers.1.mlp.down_proj" in found.ranks


def test_a_setting_of_training_is_told(tmp_path: Path, vera: Path) -> None:
    """A dropout that the method lacks changes no output, so it is a warning."""
    settings = json.loads((vera / "adapter_config.json").read_text())
    folder = folder_of(tmp_path, {**settings, "vera_dropout": 0.1}, load_file(vera / "adapter_model.safetensors"))
    with pytest.warns(
        tunerkit.TunerkitWarning, match="'vera_dropout' is 0.1, which method 'example-vera' does not have"
    ):
        tunerkit.load(CASES["llama"].build(), folder)


def test_another_base_model_is_named(vera: Path) -> None:
    """Sizes of the layer that differ are another model's, and so are paths."""
    small = CASES["llama"].build()
    small.model.layers[0].self_attn.q_proj = nn.Linear(16, 8)  # type: ignore[union-attr, index]
    with pytest.raises(tunerkit.errors.BaseMismatchError, match=r"vera_lambda_b' is \[16\]; expected \[out 8\]"):
        tunerkit.load(small, vera)
    with pytest.raises(tunerkit.errors.BaseMismatchError, match="made for another base model"):
        tunerkit.load(CASES["bert"].build(), vera)


def test_a_layer_of_another_class_is_refused(tmp_path: Path) -> None:
    """VeRA's names are declared for linear layers, so a folder with a convolution is refused, and so is writing one."""
    tensors = {f"{peft_folders.PREFIX}two.vera_lambda_{x}": torch.ones(n) for x, n in (("b", 4), ("d", 5))}
    tensors |= {"base_model.vera_A": torch.ones(5, 6), "base_model.vera_B": torch.ones(4, 5)}
    folder = folder_of(
        tmp_path / "theirs", {"peft_type": "VERA", "r": 5, "save_projection": True, "target_modules": ["two"]}, tensors
    )
    peft_folders.refused(folder, "belongs to a Conv2d here", "Linear, Conv1D", model=CASES["convolutions"].build())
    model = tunerkit.wrap(CASES["convolutions"].build(), NAME, {"targets": ["two"]})
    randomize_(model)
    with pytest.raises(tunerkit.errors.FileError, match=r"two \(Conv2d\)"):
        tunerkit.export(model, tmp_path / "ours")
    tunerkit.export(model, tmp_path / "ours", form="uniform")  # VeRA adds products
    again = peft.PeftModel.from_pretrained(CASES["convolutions"].build(), str(tmp_path / "ours")).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        assert close(CASES["convolutions"].output(again), CASES["convolutions"].output(model))


def test_trained_modules_and_biases_go_both_ways(tmp_path: Path) -> None:
    """They are the same as for a LoRA, with the type's own word for the biases of its targets."""
    case = CASES["bert"]
    expected = theirs(case, ("query",), tmp_path / "theirs", bias="vera_only", modules_to_save=["classifier"])
    model = tunerkit.load(case.build(), tmp_path / "theirs")
    with torch.no_grad():
        assert close(case.output(model), expected)
        written = tunerkit.export(model, tmp_path / "ours")
        assert peft_folders.settings(written)["bias"] == "vera_only"
        again = peft.PeftModel.from_pretrained(case.build(), str(written))  # type: ignore[arg-type]
        assert close(case.output(again.eval()), expected)


def test_no_type_without_its_method(tmp_path: Path, vera: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the distribution that would bring the method."""
    monkeypatch.setattr(declarations, "declarations", list)
    peft_folders.refused(
        vera, "'VERA'", "no installed method reads it", "tunerkit[methods]", model=CASES["llama"].build()
    )


def test_a_config_of_peft_is_converted() -> None:
    """The settings, and the modules that PEFT would adapt: its default ones if none are named."""
    config = config_of(bias="vera_only")
    expected: Any = peft.get_peft_model(CASES["llama"].build(), config)  # type: ignore[arg-type]
    tuner = tunerkit.tuner(tunerkit.wrap(CASES["llama"].build(), NAME, config_of(bias="vera_only")))
    found = {path for path, module in expected.base_model.model.named_modules() if hasattr(module, "base_layer")}
    assert {target.path for target in tuner.targets} == found
    assert (tuner.config.rank, tuner.config.bias) == (5, "adapters")  # type: ignore[attr-defined]


def test_what_would_be_another_training_is_refused() -> None:
    """A folder with such a setting is read; here it would train something else."""
    with pytest.raises(tunerkit.errors.ConfigError, match=r"'vera_dropout' is 0\.5, which method 'example-vera'"):
        tunerkit.wrap(CASES["bert"].build(), NAME, config_of(vera_dropout=0.5))
    with pytest.raises(tunerkit.errors.ConfigError, match="describes method 'example-vera', got 'lora'"):
        tunerkit.wrap(CASES["bert"].build(), "lora", config_of())


def test_the_form_of_the_method_can_be_asked_for(tmp_path: Path) -> None:
    """Only a method that declares PEFT's names has a form of its own; a rank belongs to a LoRA."""
    model = tunerkit.wrap(CASES["llama"].build(), NAME, {"targets": ["q_proj"]})
    randomize_(model)
    with pytest.raises(tunerkit.errors.ConfigError, match="VERA keeps the adapter's sizes"):
        tunerkit.export(model, tmp_path / "out", rank=64)
    plain = tunerkit.wrap(CASES["llama"].build(), "lora", {"targets": ["q_proj"]})
    with pytest.raises(tunerkit.errors.ConfigError, match="'lora' declares no names of PEFT's"):
        tunerkit.export(plain, tmp_path / "out", form="own")


# --- Declarations that are wrong --------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Any, str]] = {
    "no type": ({"tensors": {}}, "'type' is missing"),
    "an unknown key": ({**NAMES, "tensor": {}}, "'tensor' is none of .*did you mean 'tensors'"),
    "a tensor's name": ({**NAMES, "tensors": {"b": 3}}, "tensors: b: expected a mapping from names, got 3"),
    "a shape": (
        {**NAMES, "tensors": {"b": {"name": "x", "shape": "out"}}},
        "tensors: b: shape: expected a list of sizes",
    ),
    "a key of a tensor": (
        {**NAMES, "tensors": {"b": {"name": "x", "option": True}}},
        "tensors: b: 'option' is none of .*did you mean 'optional'",
    ),
    "a name twice": ({**NAMES, "tensors": {"b": "x", "d": "x"}}, "'d' and 'b' are both 'x'"),
    "a setting": ({**NAMES, "settings": {"rnk": "r"}}, "Config has no setting 'rnk'; did you mean 'rank'"),
    "a field twice": ({**NAMES, "ignored": ["r"]}, "ignored: 'r' belongs to settings.rank already"),
    "a field of all": ({**NAMES, "constants": {"bias": "none"}}, "'bias' belongs to what every type has"),
    "a choice": (
        {**NAMES, "tensors": {"b": {"name": "x", "chosen": {"rank": [1]}}}},
        "'b' is chosen by 'rank', which is no setting with targets=True",
    ),
    "a pattern": (
        {**NAMES, "settings": {"rank": {"name": "r", "pattern": "rank_pattern"}}},
        "settings.rank: Config has no setting 'rank_pattern'",
    ),
    "a setting in place of another": (
        {**NAMES, "settings": {"rank": {"name": "r", "instead_of": "size"}}},
        "settings.rank: Config has no setting 'size'",
    ),
    "what every PEFT reads": (
        {**NAMES, "settings": {"rank": {"name": "r", "portable": 1}}},
        "settings: rank: portable: expected a value and a sentence, got 1",
    ),
    "a fixed setting": ({**NAMES, "fixed": {"rnk": (1, "Linear")}}, "Config has no setting 'rnk'; did you mean 'rank'"),
    "a fixed setting's layers": (
        {**NAMES, "fixed": {"rank": 1}},
        "fixed: rank: expected a value and the classes of layers, got 1",
    ),
    "another form": ({**NAMES, "others": {"x": 3}}, "others: x: expected a function of the tensors of a target, got 3"),
    "a star": ({**NAMES, "shared": {"q": "vera_*"}}, "a '\\*' ends both names"),
}


@contextmanager
def declaring(names: Any) -> Iterator[nn.Module]:
    """A model with an adapter of the method, which declares other names."""
    tunerkit.unregister(PLUGIN)
    try:
        with registered(Plugin(names)):
            model = tunerkit.wrap(CASES["llama"].build(), NAME, {"targets": ["q_proj"], "rank": 5})
            randomize_(model)
            yield model
    finally:
        tunerkit.register(PLUGIN)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_declaration_names_plugin_and_method(tmp_path: Path, wrong: str) -> None:
    """It is found when the names are needed."""
    names, part = WRONG[wrong]
    expected = rf"(?s)method 'example-vera' \(in-process\).*{part}"
    with declaring(names) as model, pytest.raises(tunerkit.errors.PluginError, match=expected):
        tunerkit.export(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("tensors", "part"),
    [
        ({"b": "vera_lambda_b"}, "for tensor 'd': it is declared nowhere"),
        ({"b": {"name": "vera_lambda_b", "shape": ["out", "rank"]}, "d": "vera_lambda_d"}, "fewer dimensions"),
        (
            {"b": {"name": "vera_lambda_b", "shape": ["rank"]}, "d": {"name": "vera_lambda_d", "shape": ["rank"]}},
            "rank",
        ),
    ],
)
def test_tensors_that_are_declared_wrongly_are_named(tmp_path: Path, tensors: Any, part: str) -> None:
    """Else PEFT's folder would lack one, or hold it in another shape."""
    names = {**NAMES, "tensors": tensors}
    with declaring(names) as model, pytest.raises(tunerkit.errors.PluginError, match=part):
        tunerkit.export(model, tmp_path / "out")
