"""What PEFT's files do not say, or say otherwise than one would think: each trap once, against peft itself."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import tunerkit
from plugins.peft.tests import peft_adapters, peft_folders
from plugins.peft.tests.peft_folders import IDS, PREFIX
from plugins.peft.tests.peft_models import CASES, TIED, Case
from tunerkit.plugin import biases_of, factors_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def by_peft(model: nn.Module, folder: Path) -> Any:
    """What peft makes of a folder."""
    return peft.PeftModel.from_pretrained(model, str(folder)).eval()  # type: ignore[arg-type]


@torch.no_grad()
def same(folder: Path, case: Case | None = None) -> None:
    """A folder computes the same in tunerkit and in peft."""
    if case is None:
        ours, theirs = tunerkit.load(peft_folders.net(), folder)(IDS), by_peft(peft_folders.net(), folder)(IDS)
    else:
        ours = case.output(tunerkit.load(case.build(), folder))
        theirs = case.output(by_peft(case.build(), folder))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def saved(path: Path, config: peft.LoraConfig, model: nn.Module | None = None) -> Path:
    """An adapter with random values that peft saved."""
    torch.manual_seed(3)
    made: Any = peft.get_peft_model(model or peft_folders.net(), config)  # type: ignore[arg-type]
    peft_adapters.randomize_(made)
    made.save_pretrained(str(path))
    return path


def test_the_output_projection_of_attention_counts_twice(tmp_path: Path) -> None:
    """PEFT adds its product twice; so tunerkit doubles it on the way in, and halves it on the way out."""
    case = CASES["attention"]
    folder = saved(tmp_path / "in", peft.LoraConfig(r=2, target_modules=["attention"]), case.build())
    same(folder, case)
    model = tunerkit.load(case.build(), folder)
    product = factors_of(tunerkit.tuner(model))["attention.out_proj"]
    written = peft_folders.held(tunerkit.export(model, tmp_path / "out", rank=2))
    inner = "attention.base_layer.out_proj"
    half = written[f"{inner}.lora_B.weight"] @ written[f"{inner}.lora_A.weight"]
    assert torch.allclose(2 * half, product.p @ product.q)


@pytest.mark.parametrize("targets", [["attention"], ["attention.out_proj"]])
@pytest.mark.parametrize("form", ["uniform", "compact"])
def test_half_of_an_attention_is_written_with_zeros_for_the_other(
    tmp_path: Path, targets: list[str], form: str
) -> None:
    """PEFT adapts both projections or none, so the one that is no target gets zeros."""
    case = CASES["attention"]
    model = tunerkit.wrap(case.build(), "lora", {"rank": 3, "targets": [f"re:{targets[0]}"]})
    peft_adapters.randomize_(model)
    with torch.no_grad():
        theirs = case.output(by_peft(case.build(), tunerkit.export(model, tmp_path / form, form=form)))
        assert torch.allclose(theirs, case.output(model), atol=1e-5)
    assert tunerkit.tuner(tunerkit.load(case.build(), tmp_path / form)).ranks()[targets[0]] == 3


def test_the_rank_comes_from_the_tensor_where_patterns_overlap(tmp_path: Path) -> None:
    """PEFT sorts the patterns when it saves; the rank of the file is that of one of them, in whatever order."""
    ranks = {"layers.0.query": 3, "query": 5}  # PEFT takes the first that matches
    tensors = {**peft_folders.tensors(("layers.0.query",), 3), **peft_folders.tensors(("layers.1.query",), 5)}
    for config in (ranks, dict(sorted(ranks.items(), reverse=True))):
        folder = peft_folders.folder(tmp_path, {"rank_pattern": config}, tensors)
        model = tunerkit.load(peft_folders.net(), folder)
        assert tunerkit.tuner(model).ranks() == {"layers.0.query": 3, "layers.1.query": 5}


def test_overlapping_patterns_with_one_alpha_are_no_ambiguity(tmp_path: Path) -> None:
    """Only different values at one module are refused."""
    folder = peft_folders.folder(tmp_path, {"alpha_pattern": {"query": 8, "0.query": 8, "value": 3}})
    same(folder)


@pytest.mark.parametrize("alpha", [0, -3, 8])
def test_the_scale_of_adalora_is_pefts(tmp_path: Path, alpha: int) -> None:
    """It is alpha/(init_r + 1e-5), or with alpha of 0 or less the rank that is loaded over that."""
    config = peft.AdaLoraConfig(
        init_r=4, target_r=1, total_step=6, lora_alpha=alpha, target_modules=["q_proj", "down_proj"]
    )
    case = CASES["llama"]
    peft_adapters.save(case, peft_adapters.Drawn(config, steps=6, seed=1), tmp_path)
    masks = peft_folders.settings(tmp_path)["rank_pattern"]
    assert 0 in map(sum, masks.values())  # a module has lost all its triplets
    same(tmp_path, case)
    model = tunerkit.load(case.build(), tmp_path)
    ranks = {name.removesuffix(".lora_E"): sum(mask) for name, mask in masks.items()}
    assert tunerkit.tuner(model).ranks() == ranks


def test_an_adalora_without_a_pattern_has_its_initial_rank(tmp_path: Path) -> None:
    """Before the first allocation, and in old files, ``rank_pattern`` is null; other fields may be missing."""
    tensors = {}
    for name, value in peft_folders.tensors(rank=3).items():
        tensors[name.removesuffix(".weight")] = value
        tensors[f"{name.rpartition('.lora_')[0]}.lora_E"] = torch.ones(3, 1)
    old = {"peft_type": "ADALORA", "init_r": 3, "target_r": 8, "r": 8, "rank_pattern": None, "total_step": None}
    model = tunerkit.load(peft_folders.net(), peft_folders.folder(tmp_path, old, tensors))
    assert tunerkit.tuner(model).ranks() == {"layers.0.query": 3, "layers.1.query": 3}
    with pytest.raises(tunerkit.errors.FileError, match="rank 3; 'init_r' and 'rank_pattern' say 4"):
        tunerkit.load(peft_folders.net(), peft_folders.folder(tmp_path, {**old, "init_r": 4}, tensors))


def test_settings_that_pefts_adalora_ignores_are_told(tmp_path: Path) -> None:
    """They change nothing, and a warning says so."""
    config = peft.AdaLoraConfig(
        init_r=3, target_r=1, total_step=5, target_modules=["query"], alpha_pattern={"query": 99}, use_rslora=True
    )
    folder = saved(tmp_path, config)
    with pytest.warns(tunerkit.TunerkitWarning, match="'use_rslora' is set, and PEFT's AdaLoRA ignores it"):
        tunerkit.load(peft_folders.net(), folder)
    same(folder)


def test_names_of_modules_trained_in_full_match_bare_ends(tmp_path: Path) -> None:
    """PEFT compares ends of names, also inside a word; what it saved so is read so."""
    folder = saved(tmp_path, peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["ead"]))
    same(folder)
    assert [copied.path for copied in tunerkit.tuner(tunerkit.load(peft_folders.net(), folder)).copies] == ["head"]


class Ends(nn.Module):
    """Modules whose paths are ends of others, or of what PEFT puts beside an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"query": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
        self.query = nn.Linear(4, 4)
        self.phead = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner["query"](x)) + torch.tanh(self.inner["head"](x))
        result: Tensor = self.head(torch.tanh(self.phead(torch.tanh(self.query(h)))))
        return result


def ends() -> nn.Module:
    """The same model each time."""
    torch.manual_seed(0)
    return Ends()


@pytest.mark.parametrize("form", ["uniform", "compact", "adalora"])
def test_a_path_that_is_the_end_of_another_selects_one_module(tmp_path: Path, form: str) -> None:
    """The folder adapts "query" and not "inner.query"."""
    config = {"rank": 3, "targets": ["re:query", "re:phead"], "rank_pattern": {"phead": 2}}
    model = tunerkit.wrap(ends(), "lora", config)
    peft_adapters.randomize_(model)
    folder = tunerkit.export(model, tmp_path / form, form=form)
    theirs = by_peft(ends(), folder)
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    assert torch.allclose(theirs(x), model(x), atol=1e-5)
    adapted = {name for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {PREFIX + "query", PREFIX + "phead"}


@pytest.mark.parametrize(
    ("heads", "other"),
    [(["re:head"], "'inner.head', 'phead'"), (["re:head", "inner.head"], "'phead'"), (["phead"], "")],
)
def test_a_head_that_peft_cannot_select_alone_is_refused(tmp_path: Path, heads: list[str], other: str) -> None:
    """PEFT compares ends of names, so "head" is also "phead"; both can be trained in full, but not one."""
    model = tunerkit.wrap(ends(), "lora", {"targets": ["query"], "train_modules": heads})
    peft_adapters.randomize_(model)
    if other:
        with pytest.raises(tunerkit.errors.FileError, match=f"it would also take {other}.*train_modules"):
            tunerkit.export(model, tmp_path / "out")
        return
    theirs = by_peft(ends(), tunerkit.export(model, tmp_path / "out"))
    wrapped = {name for name, module in theirs.named_modules() if type(module).__name__ == "ModulesToSaveWrapper"}
    assert wrapped == {PREFIX + "phead"}
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    assert torch.allclose(theirs(x), model(x), atol=1e-5)


def test_heads_that_are_ends_of_each_other_go_out_together(tmp_path: Path) -> None:
    """All modules that PEFT selects are trained in full."""
    model = tunerkit.wrap(ends(), "lora", {"targets": ["query"], "train_modules": ["re:head", "phead", "inner.head"]})
    peft_adapters.randomize_(model)
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    assert torch.allclose(by_peft(ends(), tunerkit.export(model, tmp_path / "out"))(x), model(x), atol=1e-5)


def test_a_head_that_ends_like_a_part_of_an_adapter_is_refused(tmp_path: Path) -> None:
    """PEFT would take "lora_dropout" for "out", and crash."""
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "out": nn.Linear(4, 4)})
    tunerkit.wrap(model, "lora", {"targets": ["query"], "train_modules": ["out"]})
    peft_adapters.randomize_(model)
    with pytest.raises(tunerkit.errors.FileError, match=r"'query\.lora_dropout'"):
        tunerkit.export(model, tmp_path / "out")


def test_ranks_of_paths_that_are_ends_of_each_other_stay_apart(tmp_path: Path) -> None:
    """In the compact form each has its own pattern."""
    model = tunerkit.wrap(ends(), "lora", {"rank": 3, "targets": ["query"], "rank_pattern": {"re:query": 1}})
    peft_adapters.randomize_(model)
    folder = tunerkit.export(model, tmp_path / "out", form="compact")
    assert peft_folders.settings(folder)["rank_pattern"] == {"^query": 1}
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    assert torch.allclose(by_peft(ends(), folder)(x), model(x), atol=1e-5)


def test_stray_biases_beside_a_head_are_ignored(tmp_path: Path) -> None:
    """With bias="all" PEFT saves the bias of a head that is trained in full three times."""
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["head"], bias="all")
    folder = saved(tmp_path, config)
    names = peft_folders.held(folder)
    assert {"head.bias", "head.modules_to_save.bias", "head.original_module.bias"} <= names.keys()
    same(folder)
    biases = biases_of(tunerkit.tuner(tunerkit.load(peft_folders.net(), folder)))
    assert biases.keys() == {f"layers.{layer}.{name}" for layer in (0, 1) for name in ("query", "value")}


def test_the_table_of_an_adapted_embedding_is_compared(tmp_path: Path) -> None:
    """PEFT saves it whole. The same one is accepted in half precision too, and another one is refused."""
    case = CASES["llama"]
    folder = saved(tmp_path, peft.LoraConfig(r=2, target_modules=["embed_tokens"]), case.build())
    assert "model.embed_tokens.base_layer.weight" in peft_folders.held(folder)
    same(folder, case)
    other: Any = case.build()
    other.model.embed_tokens.weight.data[3, 0] += 0.5
    with pytest.raises(
        tunerkit.errors.BaseMismatchError, match=r"differs from this model's weight at 'model\.embed_tokens'"
    ):
        tunerkit.load(other, folder)
    tunerkit.load(case.build().bfloat16(), folder)


def test_the_padding_row_gets_nothing(tmp_path: Path) -> None:
    """PEFT adds to it and tunerkit does not: a warning on the way in, zeros on the way out."""
    tensors = {
        f"{PREFIX}embed_tokens.lora_embedding_A": torch.ones(2, 10),
        f"{PREFIX}embed_tokens.lora_embedding_B": torch.ones(4, 2),
    }
    folder = peft_folders.folder(tmp_path / "in", {"target_modules": ["embed_tokens"]}, tensors)
    with pytest.warns(tunerkit.TunerkitWarning, match="padding token of 'embed_tokens'"):
        model = tunerkit.load(peft_folders.net(), folder)
    written = peft_folders.held(tunerkit.export(model, tmp_path / "out"))["embed_tokens.lora_embedding_A"]
    assert written[:2, 0].tolist() == [0, 0]
    assert written[:2, 1:].all()
    assert torch.allclose(by_peft(peft_folders.net(), tmp_path / "out")(IDS), model(IDS), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"groups": 2}, "groups 2"),
        ({"dilation": 2}, "dilation"),
        ({"padding": 1, "padding_mode": "circular"}, "padding mode 'circular'"),
    ],
)
def test_convolutions_in_which_peft_changes_no_weight_are_refused(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    """Both ways, with the reason and the way out. PEFT cannot merge such an adapter either, so that is not one."""
    model = nn.Sequential(nn.Conv1d(4, 4, 3, **options))
    tensors = {f"{PREFIX}0.lora_A.weight": torch.ones(2, 4, 3), f"{PREFIX}0.lora_B.weight": torch.ones(4, 2, 1)}
    with pytest.raises(tunerkit.errors.FileError, match=f"(?s)PEFT cannot merge.*train one with tunerkit.*{reason}"):
        tunerkit.load(model, peft_folders.folder(tmp_path / "in", None, tensors))
    tunerkit.wrap(model, "lora", {"targets": ["0"]})
    with pytest.raises(tunerkit.errors.FileError, match=f"(?s)no change of their weight.*unwrap.*{reason}"):
        tunerkit.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_grouped_convolution_of_peft_is_not_called_damaged(tmp_path: Path) -> None:
    """Its matrices have other sizes in PEFT than those of a product: that is no damage."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(str(tmp_path))  # type: ignore[arg-type]
    text = peft_folders.refused(
        tmp_path, "PEFT changes the output", "no change of their weight", "0 (groups 2)", model=model
    )
    assert "damaged" not in text


def test_rows_of_zeros_are_padding(tmp_path: Path) -> None:
    """A row of A and its column of B that are both zero are left out; a fresh adapter keeps its rank."""
    tensors = peft_folders.tensors()
    tensors[f"{PREFIX}layers.0.query.lora_A.weight"][1] = 0
    tensors[f"{PREFIX}layers.0.query.lora_B.weight"][:, 1] = 0
    tensors[f"{PREFIX}layers.1.query.lora_B.weight"][:] = 0
    folder = peft_folders.folder(tmp_path, None, tensors)
    assert tunerkit.tuner(tunerkit.load(peft_folders.net(), folder)).ranks() == {
        "layers.0.query": 1,
        "layers.1.query": 2,
    }
    same(folder)


@pytest.mark.parametrize("alpha", [-4, 0])
def test_a_scale_of_zero_or_less_goes_into_b(tmp_path: Path, alpha: int) -> None:
    """PEFT allows it for LoRA; tunerkit's alpha is above 0."""
    same(peft_folders.folder(tmp_path, {"lora_alpha": alpha}))


def test_names_with_an_adapters_name_in_them_are_read(tmp_path: Path) -> None:
    """Some programs save ``lora_A.default.weight``."""
    named = {name.replace(".weight", ".default.weight"): each for name, each in peft_folders.tensors().items()}
    plain = tunerkit.load(peft_folders.net(), peft_folders.folder(tmp_path / "plain"))
    model = tunerkit.load(peft_folders.net(), peft_folders.folder(tmp_path / "named", None, named))
    assert torch.equal(model(IDS), plain(IDS))


def test_a_wrapper_that_came_or_went_is_found(tmp_path: Path) -> None:
    """The body of a head model, and a model around a body: the paths are moved, with a warning."""
    body = nn.ModuleDict({"model": peft_folders.net()})
    with pytest.warns(tunerkit.TunerkitWarning, match=r"found under 'model\.' instead of 'the model itself'"):
        outer = tunerkit.load(body, peft_folders.folder(tmp_path / "inner"))
    assert tunerkit.tuner(outer).ranks() == {"model.layers.0.query": 2, "model.layers.1.query": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tunerkit.TunerkitWarning)
        written = tunerkit.export(outer, tmp_path / "outer")
        assert tunerkit.tuner(tunerkit.load(peft_folders.net(), written)).ranks() == {
            "layers.0.query": 2,
            "layers.1.query": 2,
        }


def test_another_name_of_the_base_is_a_warning(tmp_path: Path) -> None:
    """Names and shapes fit, so the adapter is loaded; a copy of the same model in a folder is no other base."""
    case = CASES["llama"]
    folder = saved(tmp_path, peft.LoraConfig(r=2, target_modules=["q_proj"]), case.build())
    found = peft_folders.settings(folder)
    found["base_model_name_or_path"] = "org/base"
    peft_folders.folder(folder, found, {PREFIX + name: each for name, each in peft_folders.held(folder).items()})
    model: Any = case.build()
    model.config._name_or_path = "/folder/of/base"
    with warnings.catch_warnings():
        warnings.simplefilter("error", tunerkit.TunerkitWarning)
        tunerkit.load(model, folder)
    model = case.build()
    model.config._name_or_path = "org/other"
    with pytest.warns(tunerkit.TunerkitWarning, match="'org/base', and this one is 'org/other'"):
        tunerkit.load(model, folder)


def test_tied_adapters_of_which_one_side_is_there_are_refused(tmp_path: Path) -> None:
    """With ``ensure_weight_tying`` PEFT changes the output head too, and the file does not say how."""
    tensors = {
        f"{PREFIX}embed_tokens.lora_embedding_A": torch.ones(2, 10),
        f"{PREFIX}embed_tokens.lora_embedding_B": torch.ones(4, 2),
    }
    with pytest.raises(tunerkit.errors.FileError, match="do not have both sides"):
        tunerkit.load(peft_folders.net(), peft_folders.folder(tmp_path, {"ensure_weight_tying": True}, tensors))
    tunerkit.load(peft_folders.net(), peft_folders.folder(tmp_path, {"ensure_weight_tying": True}))


@pytest.mark.parametrize(
    "given",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
def test_both_sides_of_a_tie_are_read(tmp_path: Path, given: dict[str, Any]) -> None:
    """PEFT's folder has them with ``ensure_weight_tying``, whichever side is named; and ours is read by PEFT."""
    case = TIED
    config = peft.LoraConfig(**{"target_modules": ["q_proj"], **given}, ensure_weight_tying=True)
    theirs: Any = peft.get_peft_model(case.build(), config)  # type: ignore[arg-type]
    peft_adapters.randomize_(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    expected = case.output(theirs.eval())
    with pytest.warns(tunerkit.TunerkitWarning, match="PEFT trains 'model.embed_tokens', 'lm_head' as one") as told:
        model = tunerkit.load(case.build(), tmp_path / "theirs")
    assert "does not name" not in str(told[0].message)
    again = peft_adapters.loaded(case, tunerkit.export(model, tmp_path / "ours"))
    for found in (model, again):
        assert (case.output(found) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_adalora_ignores_dora_as_peft_does(tmp_path: Path) -> None:
    """Its layers never read the flag, so the folder is AdaLoRA's; a warning says so."""
    config = peft.AdaLoraConfig(init_r=2, target_r=1, total_step=10, target_modules=["query"])
    config.use_dora = True
    with pytest.warns(tunerkit.TunerkitWarning, match="'use_dora' is set, and PEFT's AdaLoRA ignores it"):
        model = tunerkit.load(peft_folders.net(), saved(tmp_path, config))
    assert tunerkit.tuner(model).method == "adalora"


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica"])
def test_starts_that_leave_the_base_alone_are_read(tmp_path: Path, start: Any) -> None:
    """The files say all of such an adapter."""
    same(saved(tmp_path, peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=start)))


def test_velora_is_read(tmp_path: Path) -> None:
    """It approximates gradients and has a buffer of its own; what it computes is LoRA."""
    velora = peft.tuners.lora.config.VeloraConfig(num_groups=2, init_type="random")
    folder = saved(tmp_path, peft.LoraConfig(r=2, target_modules=["query"], velora_config=velora))
    with pytest.warns(tunerkit.TunerkitWarning, match="VeLoRA"):
        same(folder)
