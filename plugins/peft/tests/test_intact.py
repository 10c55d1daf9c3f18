"""Folders of PEFT's that are as they should be, though tensors or settings are not the usual ones of their type."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tunerkit
from plugins.peft.tests import peft_folders
from tunerkit.errors import BaseMismatchError, FileError, TunerkitWarning
from tunerkit_peft.reading import describe

pytest.importorskip("tunerkit_methods")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of its own defaults
PATTERNS = {"rank_pattern": {"second": 2}, "alpha_pattern": {"second": 5}}


class Layers(nn.Module):
    """Two layers of other sizes, with a non-linear function between them."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.tanh(self.first(x)))
        return result


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (Layers(nn.Linear(12, 20), nn.Linear(20, 8)), torch.randn(4, 12)),
    "conv1d": lambda: (Layers(nn.Conv1d(6, 12, 3), nn.Conv1d(12, 8, 2)), torch.randn(2, 6, 9)),
    "long": lambda: (Layers(nn.Conv1d(6, 32, 3), nn.Conv1d(32, 8, 2)), torch.randn(2, 6, 9)),
    "conv2d": lambda: (Layers(nn.Conv2d(6, 12, 3), nn.Conv2d(12, 8, 2)), torch.randn(2, 6, 5, 5)),
    "grouped": lambda: (Layers(nn.Conv2d(6, 12, 3, groups=2), nn.Conv2d(12, 8, 1)), torch.randn(2, 6, 5, 5)),
    "conv3d": lambda: (Layers(nn.Conv3d(4, 6, 2), nn.Conv3d(6, 4, 1)), torch.randn(2, 4, 3, 3, 3)),
    # Kernels that cover the whole input.
    "covered": lambda: (Layers(nn.Conv2d(4, 12, 3), nn.Conv2d(12, 8, 1)), torch.randn(2, 4, 3, 3)),
    "embedding": lambda: (Layers(nn.Embedding(10, 12), nn.Linear(12, 8)), torch.randint(10, (2, 5))),
    "norm": lambda: (Layers(nn.Linear(12, 8), nn.LayerNorm(8)), torch.randn(4, 12)),
}


def build(model: str) -> tuple[nn.Module, Tensor]:
    """The same model and input each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made, x = MODELS[model]()
        return made.eval(), x


def made(model: str, config: Any, folder: Path) -> Tensor:
    """Let PEFT make an adapter with random values, and save it; the output of its model."""
    base, x = build(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapted: Any = peft.get_peft_model(base, config)  # type: ignore[arg-type]
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(str(folder))
    with torch.no_grad():
        result: Tensor = adapted.eval()(x)
    return result


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs are equal in fp32."""
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@attrs.frozen
class Case:
    """A folder: PEFT's config class and its fields, and on which model."""

    model: str
    config: Callable[..., Any]
    fields: dict[str, Any]
    targets: tuple[str, ...] = ("first", "second")


CASES: dict[str, Case] = {
    "ia3, inputs of convolutions": Case("conv2d", peft.IA3Config, {"feedforward_modules": ["first"]}),
    "ia3, inputs of groups": Case("grouped", peft.IA3Config, {"feedforward_modules": ["first", "second"]}),
    "ia3, inputs in three dimensions": Case("conv3d", peft.IA3Config, {"feedforward_modules": ["second"]}),
    # Without its CUDA extension, PEFT computes with one factor, and saves the configured number.
    "boft, factors": Case("linear", peft.BOFTConfig, {"boft_block_size": 2, "boft_n_butterfly_factor": 2}),
    "boft, blocks": Case("linear", peft.BOFTConfig, {"boft_block_size": 0, "boft_block_num": 4}),
    "oft, blocks": Case("linear", peft.OFTConfig, {"r": 4, "oft_block_size": 0}),
    "oft, blocks that do not fit": Case("linear", peft.OFTConfig, {"r": 5, "oft_block_size": 0, "block_share": True}),
    "oft, a size that does not fit": Case("linear", peft.OFTConfig, {"oft_block_size": 7}),
    "oft, constrained": Case("linear", peft.OFTConfig, {"oft_block_size": 4, "coft": True, "eps": 0.3}),
    "oft, a convolution": Case("covered", peft.OFTConfig, {"r": 2, "oft_block_size": 0}),
    "oft, an embedding": Case("embedding", peft.OFTConfig, {"r": 3, "oft_block_size": 0}),
    "loha, effective": Case("conv2d", peft.LoHaConfig, {"r": 3, "use_effective_conv2d": True}),
    "loha, effective in one dimension": Case("conv1d", peft.LoHaConfig, {"r": 3, "use_effective_conv2d": True}),
    "loha, patterns": Case("linear", peft.LoHaConfig, {"r": 3, "alpha": 6, **PATTERNS}),
    "lokr, effective": Case("conv2d", peft.LoKrConfig, {"r": 1, "use_effective_conv2d": True}),
    "lokr, effective in one dimension": Case(
        "long", peft.LoKrConfig, {"r": 2, "use_effective_conv2d": True}, ("first",)
    ),
    "lokr, one dimension": Case("conv1d", peft.LoKrConfig, {"r": 8}),
    "lokr, products in one dimension": Case("conv1d", peft.LoKrConfig, {"r": 1}),
    "lokr, patterns": Case("linear", peft.LoKrConfig, {"r": 8, "alpha": 6, **PATTERNS}),
    "c3a, patterns": Case("linear", peft.C3AConfig, {"block_size": 2, "block_size_pattern": {"second": 4}}),
    "fourierft, patterns": Case(
        "linear", peft.FourierFTConfig, {"n_frequency": 9, "n_frequency_pattern": {"second": 5}}
    ),
    "delora, patterns": Case("linear", peft.DeloraConfig, {"r": 3, "rank_pattern": {"second": 2}}),
    "dora, patterns": Case("linear", peft.LoraConfig, {"r": 3, "use_dora": True, "use_rslora": True, **PATTERNS}),
    "randlora, a high rank": Case("linear", peft.RandLoraConfig, {"r": 32, "randlora_alpha": 1}),
    "randlora, sparse": Case("linear", peft.RandLoraConfig, {"r": 4, "randlora_alpha": 1, "sparse": True}),
    "miss, random": Case("linear", peft.MissConfig, {"r": 2, "init_weights": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_read_merged_and_written(tmp_path: Path, name: str) -> None:
    """Outputs equal PEFT's, also when merged; what is written, PEFT and tunerkit load."""
    case = CASES[name]
    config = case.config(target_modules=list(case.targets), **case.fields)
    expected = made(case.model, config, tmp_path / "theirs")
    model, x = build(case.model)
    tunerkit.load(model, tmp_path / "theirs")
    with torch.no_grad():
        output = model(x)
        assert close(output, expected)
        tunerkit.export(model, tmp_path / "ours")
        tunerkit.merge(model)
        assert close(model(x), expected)
        again: Any = peft.PeftModel.from_pretrained(build(case.model)[0], str(tmp_path / "ours"))  # type: ignore[arg-type]
        assert close(again.eval()(x), expected)
        assert torch.equal(tunerkit.load(build(case.model)[0], tmp_path / "ours")(x), output)


# A folder, and what the error says.
REFUSED: dict[str, tuple[Case, tuple[str, ...]]] = {
    "dora with groups": (
        Case("grouped", peft.LoraConfig, {"r": 2, "use_dora": True}, ("first",)),
        ("PEFT cannot merge it", "first (groups 2)", "train one with tunerkit"),
    ),
    "tinylora at an embedding": (
        Case("embedding", peft.TinyLoraConfig, {"r": 2, "u": 4, "init_weights": "uniform"}, ("first",)),
        ("belongs to an Embedding here", "merge_and_unload"),
    ),
    "ln tuning of a layer": (
        Case("norm", peft.LNTuningConfig, {}, ("first",)),
        ("belongs to a Linear here, which PEFT trains in full", "merge_and_unload"),
    ),
    "miss, another product": (
        Case("linear", peft.MissConfig, {"r": 2, "init_weights": "bat"}),
        ("'init_weights' is 'bat'", "merge_and_unload"),
    ),
    "bases that are not saved": (
        Case("linear", peft.RandLoraConfig, {"r": 4, "sparse": True, "save_projection": False}),
        ("'sparse' is True", "merge_and_unload"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_called_by_its_name(tmp_path: Path, name: str) -> None:
    """It is not damaged, and the error says what to do with it."""
    case, parts = REFUSED[name]
    made(case.model, case.config(target_modules=list(case.targets), **case.fields), tmp_path)
    text = peft_folders.refused(tmp_path, *parts, model=build(case.model)[0])
    assert "damaged" not in text
    assert len(text) < 1000


def edited(tmp_path: Path, case: Case, settings: dict[str, Any], leave_out: str = "nothing") -> Path:
    """A folder of PEFT's with other settings, and without the tensors that have a word in their names."""
    made(case.model, case.config(target_modules=list(case.targets), **case.fields), tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    kept = {key: each for key, each in held.items() if leave_out not in key}
    changed = {**peft_folders.settings(tmp_path), **settings}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "settings", "left_out", "part"),
    [
        ("loha, effective", {}, "hada_t2", "hada_t1' is there without its hada_t2"),
        ("loha, effective", {}, "first.hada_w1_b", "hada_t1' is there without its hada_w1_b"),
        ("loha, patterns", {"rank_pattern": {}}, "nothing", "has rank 2; 'r' says 3"),
        ("loha, patterns", {"rank_pattern": {"second": 5}}, "nothing", "has rank 2; 'r' and 'rank_pattern' say 5"),
        ("loha, patterns", {"rank_pattern": {"second": "x"}}, "nothing", "an object that maps patterns to numbers"),
        ("loha, patterns", {"alpha_pattern": {"second": 1, "sec.*": 2}}, "nothing", "several values for 'second'"),
        ("oft, blocks", {"r": 4, "oft_block_size": 4}, "nothing", "expected one of block_size and blocks, got 4 and 4"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, name: str, settings: dict[str, Any], left_out: str, part: str
) -> None:
    """Another form, a pattern or a second setting explains what it says, and nothing else."""
    peft_folders.refused(edited(tmp_path, CASES[name], settings, left_out), part, model=build(CASES[name].model)[0])


def test_a_kernel_of_another_size_costs_nothing(tmp_path: Path) -> None:
    """The shape is compared before the form is turned: here that would take 360 GB, and other files more."""
    edited(tmp_path, CASES["loha, effective"], {})
    held = load_file(tmp_path / "adapter_model.safetensors")
    wide = {"hada_t": torch.zeros(3, 3, 10_000, 10), "_b": torch.zeros(3, 300_000)}
    changed = {key: next((each for end, each in wide.items() if end in key), old) for key, old in held.items()}
    save_file({key: each.clone() for key, each in changed.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BaseMismatchError, match=r"is \[3, 30000000000\]; expected \[rank 3, in 54\]"):
        tunerkit.load(build("conv2d")[0], tmp_path)


def test_tensors_that_no_setting_names_are_told(tmp_path: Path) -> None:
    """They are loaded, where PEFT drops them: one warning. Nothing is told of a folder that is named as a whole."""
    case = Case("linear", peft.LoraConfig, {"r": 2})
    edited(tmp_path, case, {"target_modules": ["second"]})
    with pytest.warns(TunerkitWarning, match=r"does not name 'first', for which .* loaded here, and PEFT drops them"):
        model = tunerkit.load(build("linear")[0], tmp_path)
    assert {target.path for target in tunerkit.tuner(model).targets} == {"first", "second"}
    for targets in (["first", "second"], "first|second", "all-linear", None):
        edited(tmp_path, case, {"target_modules": targets})
        with warnings.catch_warnings():
            warnings.simplefilter("error", TunerkitWarning)
            tunerkit.load(build("linear")[0], tmp_path)


def test_where_pefts_oft_computes_this_merged_alone_is_told(tmp_path: Path) -> None:
    """It adds up patches that overlap; merged, it computes what is loaded here."""
    made("conv2d", peft.OFTConfig(target_modules=["first", "second"], oft_block_size=2), tmp_path / "theirs")
    model, x = build("conv2d")
    told = "adds up the patches of a convolution's input that overlap"
    with pytest.warns(TunerkitWarning, match=told):
        tunerkit.load(model, tmp_path / "theirs")
    with pytest.warns(TunerkitWarning, match=told):
        tunerkit.export(model, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        theirs: Any = peft.PeftModel.from_pretrained(build("conv2d")[0], str(tmp_path / folder))  # type: ignore[arg-type]
        with torch.no_grad():
            assert close(model(x), theirs.merge_and_unload()(x))


def test_the_tensors_say_how_many_factors_a_butterfly_has(tmp_path: Path) -> None:
    """Whatever the settings say: with its CUDA extension PEFT has as many as they do, and without it one."""
    for count, said in ((1, 2), (2, 2), (2, 1)):
        case = Case("linear", peft.BOFTConfig, {"boft_block_size": 2})
        edited(tmp_path, case, {"boft_n_butterfly_factor": said})
        held = load_file(tmp_path / "adapter_model.safetensors")
        wide = {key: each.repeat(count, 1, 1, 1) if "boft_R" in key else each for key, each in held.items()}
        save_file(wide, tmp_path / "adapter_model.safetensors")
        config: Any = tunerkit.tuner(tunerkit.load(build("linear")[0], tmp_path)).config
        assert config.factors == describe(tmp_path).settings["factors"] == count


def test_what_not_every_peft_reads_is_told(tmp_path: Path) -> None:
    """By default a butterfly has one factor, which every PEFT reads; more need its CUDA extension."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", TunerkitWarning)
        folder = exported(tmp_path / "one", "boft", {"block_size": 2})
    assert peft_folders.settings(folder)["boft_n_butterfly_factor"] == 1
    with pytest.warns(TunerkitWarning, match="'boft_n_butterfly_factor' is 2: PEFT reads more than one only where"):
        folder = exported(tmp_path / "two", "boft", {"block_size": 2, "factors": 2})
    assert peft_folders.settings(folder)["boft_n_butterfly_factor"] == 2


def exported(path: Path, method: str, settings: dict[str, Any], model: str = "linear") -> Path:
    """Wrap a model, train nothing, give it random values, and write PEFT's folder."""
    adapted = tunerkit.wrap(build(model)[0], method, {"targets": ["first", "second"], **settings}, seed=0)
    for parameter in tunerkit.tuner(adapted).parameters():
        parameter.data.add_(0.1)
    return tunerkit.export(adapted, path)


@pytest.mark.parametrize(
    ("method", "settings", "written"),
    [
        (
            "c3a",
            {"block_size": 2, "block_size_pattern": {"first": 4}},
            {"block_size": 4, "block_size_pattern": {"second": 2}},
        ),
        ("c3a", {}, {"block_size": 4, "block_size_pattern": {}}),
        (
            "loha",
            {"rank": 4, "alpha_pattern": {"first": 3.0}},
            {"r": 4, "alpha": 3.0, "alpha_pattern": {"second": 8.0}},
        ),
        ("oft", {}, {"r": 0, "oft_block_size": 32}),
        ("oft", {"blocks": 4}, {"r": 4, "oft_block_size": 0}),
        ("boft", {"blocks": 2}, {"boft_block_num": 2, "boft_block_size": 0}),
    ],
)
def test_values_of_some_targets_are_written_as_patterns(
    tmp_path: Path, method: str, settings: dict[str, Any], written: dict[str, Any]
) -> None:
    """PEFT has one value and patterns for the others, or 0 for what another setting says."""
    found = peft_folders.settings(exported(tmp_path, method, settings))
    assert {name: found[name] for name in written} == written


def test_a_product_that_peft_computes_in_another_order_is_not_written(tmp_path: Path) -> None:
    """At a Conv1d PEFT's LoKr is no Kronecker product, and the error names the setting that computes what PEFT does."""
    with pytest.raises(FileError, match=r"first \(there PEFT computes what conv1d='peft' does, and this one has 'kron"):
        exported(tmp_path, "lokr", {}, "conv1d")
    exported(tmp_path, "lokr", {"conv1d": "peft"}, "conv1d")


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("GLORA", ("a type that tunerkit does not read. Merge",)),
        ("BOTF", ("did you mean 'BOFT'? Merge",)),
        ("PREFIX_TUNING", ("adds no weights to layers", "Use this adapter in PEFT")),
    ],
)
def test_another_type_is_told_with_what_to_do(tmp_path: Path, kind: str, parts: tuple[str, ...]) -> None:
    """A name is suggested once, and for none that PEFT has."""
    text = peft_folders.refused(peft_folders.folder(tmp_path, {"peft_type": kind}), *parts)
    assert text.count("did you mean") == (kind == "BOTF")
    assert text.count("'BOFT'") <= 1


def test_patterns_of_a_config_of_peft_are_converted() -> None:
    """`tunerkit.wrap` takes them, with PEFT's expressions for the ends of paths."""
    config = peft.LoHaConfig(target_modules=["first", "second"], r=3, rank_pattern={"sec.*": 2})
    model = tunerkit.wrap(build("linear")[0], "loha", config)
    adapters: dict[str, Any] = {**tunerkit.tuner(model).adapters()}
    assert {path: each.b1.shape[1] for path, each in adapters.items()} == {"first": 3, "second": 2}
