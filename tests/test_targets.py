"""Target selection, compared with slow but obvious oracles, on odd modules and on real architectures."""

import fnmatch
import itertools
import re
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tunerkit
from tunerkit import patterns, targets
from tunerkit.errors import TargetError, TunerkitWarning, closest
from tunerkit.layers import CORE, Knowledge
from tunerkit.layers.convolution import ConvLayer
from tunerkit.libraries import DEFAULT_TARGETS
from tunerkit.patterns import matches
from tunerkit.targets import Scan
from tunerkit.testing.registering import registered
from tunerkit.testing.toy_adapters import Shift
from tunerkit.testing.toy_methods import ShiftConfig

DEFAULTS = {model_type: known.names for known in DEFAULT_TARGETS for model_type in known.model_types}
# Few and similar names, so generated names do match the ends of generated paths, at dots and elsewhere.
components = st.sampled_from(["a", "aa", "ba", "0"])
paths = st.lists(components, min_size=1, max_size=4).map(".".join)


def scanned(model: nn.Module) -> Scan:
    """The scan of a model with the kinds that the core knows."""
    return targets.scan(model, CORE)


def chosen(model: nn.Module, wanted: str | Sequence[str] | None, **options: object) -> list[str]:
    """The selected paths, each checked to lead to its module."""
    selected = targets.select(scanned(model), targets=wanted, **options)  # type: ignore[arg-type]
    assert all(model.get_submodule(target.path) is target.module for target in selected)
    return [target.path for target in selected]


@contextmanager
def silent() -> Iterator[None]:
    """Check that the block triggers no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", TunerkitWarning)
        yield


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("query", "key")})
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Linear(4, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.classifier = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


class ConvNet(nn.Module):
    """A stem, two blocks of a plain, a depthwise and a grouped convolution, and a head named as in timm."""

    def __init__(self, more: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1, groups=2), more())
            for _ in range(2)
        )
        self.fc = nn.Linear(4, 2)
        self.classifier = nn.Sequential(nn.Conv2d(4, 2, 1))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(2, 4, 4))


class OwnForward(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.T


BLOCK = ("attention.query", "attention.key", "mlp")
ALL = [f"layers.{layer}.{name}" for layer in range(3) for name in BLOCK]


# Patterns


@given(paths, paths)
def test_a_plain_name_matches_the_whole_end_of_a_path_and_nothing_else(name: str, path: str) -> None:
    """Law: a name matches if its components are the last components of the path."""
    wanted, there = name.split("."), path.split(".")
    assert matches(name, path) == (there[-len(wanted) :] == wanted)


@given(st.lists(st.one_of(components, st.sampled_from(["*", "?", "[ab]", "[!a]"])), min_size=1, max_size=4), paths)
def test_a_glob_matches_the_full_path_as_its_translation_does(parts: list[str], path: str) -> None:
    """Law: * is any text, ? one character, [..] a class, [!..] its complement; every other character is literal."""
    pattern = ".".join([*parts, "*"])
    words = {"*": ".*", "?": ".", "[ab]": "[ab]", "[!a]": "[^a]"}
    translated = r"\.".join(words.get(part, re.escape(part)) for part in [*parts, "*"])
    assert matches(pattern, path) == bool(re.fullmatch(translated, path))


@given(paths, paths)
def test_a_regular_expression_matches_the_full_path_or_not_at_all(name: str, path: str) -> None:
    """Law: re: is a full match, so an expression of plain text matches one path."""
    assert matches("re:" + re.escape(name), path) == (name == path)
    assert matches(r"re:.*\." + re.escape(name), path) == path.endswith("." + name)


def test_case_counts() -> None:
    """Law: patterns are case-sensitive on every system."""
    assert not matches("Q_proj", "a.q_proj")
    assert not matches("*.Q_proj", "a.q_proj")


def test_a_slow_regular_expression_is_stopped_after_a_second() -> None:
    """Law: a pattern that would take hours raises a clear error."""
    model = nn.ModuleDict({"a" * 60 + "b": nn.Linear(1, 1)})
    start = time.process_time()  # a busy machine takes time, but not this process's
    with pytest.raises(TargetError, match=r"'re:\(a\|aa\|a\)\+c' took longer than 1 s"):
        chosen(model, "re:(a|aa|a)+c")
    assert time.process_time() - start < 5


def test_the_second_of_a_regular_expression_is_for_all_paths_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: with a clock where each match takes 0.3 s, three paths are within the limit and thirty are not."""
    ticks = itertools.count(step=0.3)
    monkeypatch.setattr(patterns, "time", types.SimpleNamespace(thread_time=lambda: next(ticks)))
    assert chosen(nn.ModuleDict({f"a{number}": nn.Linear(1, 1) for number in range(3)}), "re:a.") == ["a0", "a1", "a2"]
    with pytest.raises(TargetError, match="took longer than 1 s"):
        chosen(nn.ModuleDict({f"a{number}": nn.Linear(1, 1) for number in range(30)}), "re:a.*")


def test_a_malformed_regular_expression_is_named() -> None:
    """Law: a bad pattern is a TargetError with the parser's message."""
    with pytest.raises(TargetError, match=r"'re:\(' is not a regular expression: missing \)"):
        chosen(Net(), "re:(")


class LookingPlugin:
    """A method that looks up a per-target setting at each target, as LoRA does; ``seen`` are the targets."""

    def __init__(self, table: dict[str, int]) -> None:
        self.table = table
        self.seen: list[str] = []

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[tunerkit.Method]:
        return [tunerkit.Method("toy-looking", config=ShiftConfig)]

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, target: tunerkit.Target, base: tunerkit.BaseLayer) -> Shift:
        self.seen.append(target.path)
        patterns.lookup(self.table, target.path, 0)
        return Shift(base)


@pytest.mark.parametrize("pattern", ["re:a[0-9]+", "*a*a*a*a*a*"])
def test_the_second_is_for_all_look_ups_of_one_call(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """Law: with a clock where each match takes 0.05 s, ten targets are within the limit of one `wrap` and sixty not."""
    ticks = itertools.count(step=0.05)
    monkeypatch.setattr(patterns, "time", types.SimpleNamespace(thread_time=lambda: next(ticks)))
    plugin = LookingPlugin({pattern: 1})
    models = [nn.ModuleDict({f"a{number}": nn.Linear(1, 1) for number in range(size)}) for size in (5, 60)]
    with registered(plugin):
        tunerkit.wrap(models[0], "toy-looking", {"targets": "all-linear"})
        plugin.seen.clear()
        with pytest.raises(TargetError, match="took longer than 1 s"):
            tunerkit.wrap(models[1], "toy-looking", {"targets": "all-linear"})
    assert len(plugin.seen) < 15


def test_a_glob_for_each_of_many_targets_costs_nothing_of_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a large model may have a setting for each target, and a busy machine must not make a difference."""
    monkeypatch.setattr(patterns, "time", types.SimpleNamespace(thread_time=lambda: pytest.fail("asked for the time")))
    plugin = LookingPlugin({f"*.a{number}": number for number in range(300)})
    model = nn.ModuleDict({"block": nn.ModuleDict({f"a{number}": nn.Linear(1, 1) for number in range(300)})})
    with registered(plugin):
        tunerkit.wrap(model, "toy-looking", {"targets": "all-linear"})
    assert len(plugin.seen) == 300


def test_a_slow_pattern_at_sixty_targets_is_stopped_after_a_second_in_all() -> None:
    """Law: each target alone is within a second; together they would take 15 s."""
    plugin = LookingPlugin({"re:(?:a|aa|a)+c": 1})
    model = nn.ModuleDict({f"{'a' * 17}b{number}": nn.Linear(1, 1) for number in range(60)})
    start = time.process_time()
    with registered(plugin), pytest.raises(TargetError, match="took longer than 1 s"):
        tunerkit.wrap(model, "toy-looking", {"targets": "all-linear"})
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "pattern",
    [
        *("re:(?R)", "re:a(?R)?", "re:(?P<x>a)(?P>x)", "re:(a)(?1)", "re:(?&x)(?P<x>a)"),  # recursion fills the memory
        *("re:(?L)(?u)", "re:" + "()" * 2000, "re:" + "(?:" * 450 + ")" * 450, "*" * 2000, "[" * 1001, "re:("),
        *("re:" + "(?:" * 25 + "a" + "+)" * 25, "re:" + "(?:" * 8 + "a" + "{9})" * 8),  # written out by the compiler
        *("re:" + "(?#(()" * 9 + "(?:" * 25 + "a" + "+)" * 25, "re:(?x)a", "re:a{9999999999999999999999}"),
        *("re:" + "[[:alpha:](]" + "(?:" * 25 + "a" + "+)" * 25, "re:a" + "{9}" * 9),
    ],
    ids=lambda pattern: pattern[:12],
)
def test_a_pattern_that_cannot_be_bounded_is_refused(pattern: str) -> None:
    """Law: whatever a pattern is, there is one short `TargetError`, after little time and memory."""
    with pytest.raises(TargetError) as caught:
        chosen(Net(), pattern)
    assert repr(pattern[:9])[:-1] in str(caught.value)
    assert len(str(caught.value)) < 400


@given(st.text("ab.*?[]!-^\\&|~", max_size=12), paths)
def test_globs_match_as_the_standard_library_does(pattern: str, path: str) -> None:
    """Law: the limit on time changes no result."""
    assert matches(pattern + "*", path) == fnmatch.fnmatchcase(path, pattern + "*")


# What is selected


@given(st.lists(st.sampled_from(["query", "key", "mlp", "attention.key"]), min_size=1, unique=True))
def test_targets_come_in_model_order_whatever_the_order_of_the_patterns(names: list[str]) -> None:
    """Law: the result is the model's modules, filtered, each once."""
    expected = [path for path in ALL if any(("." + path).endswith("." + name) for name in names)]
    with silent():
        assert chosen(Net(), names) == expected
        assert chosen(Net(), names + names) == expected


def test_all_linear_is_every_linear_layer_except_output_heads() -> None:
    """Law: heads and embeddings are left out, without a warning."""
    with silent():
        assert chosen(Net(), "all-linear") == ALL
        assert chosen(Net(), None) == ALL


def test_all_linear_works_in_a_list_with_other_patterns() -> None:
    """Law: a list selects the union of what its patterns select."""
    assert chosen(Net(), ["all-linear", "embed"]) == ["embed", *ALL]


@pytest.mark.parametrize(
    "name", ["lm_head", "score", "classifier", "qa_outputs", "cls", "head", "pre_classifier", "x_head"]
)
def test_a_head_is_known_by_its_name_outside_the_numbered_blocks_only(name: str) -> None:
    """Law: "score" at the top level is a head; "score" inside block 0 belongs to the block."""
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({name: nn.Linear(2, 2)})]), name: nn.Linear(2, 2)})
    assert chosen(model, "all-linear") == [f"blocks.0.{name}"]


@pytest.mark.parametrize("question", ["get_output_embeddings", "get_classifier"])
def test_a_head_is_known_by_what_the_model_or_a_model_inside_it_says(question: str) -> None:
    """Law: the head that a transformers or timm model reports is left out, whatever its name."""
    inner = odd(lambda: nn.Linear(2, 2))
    setattr(inner, question, lambda: inner["odd"])
    assert chosen(inner, "all-linear") == ["body"]
    assert chosen(nn.ModuleDict({"inner": inner}), "all-linear") == ["inner.body"]


def test_a_head_named_by_a_pattern_is_selected() -> None:
    """Law: only all-linear and the defaults leave heads out."""
    assert chosen(Net(), ["classifier.0"]) == ["classifier.0"]
    assert chosen(Net(), "classifier.*") == ["classifier.0", "classifier.1"]


@given(st.sets(st.integers(0, 2), min_size=1))
def test_layers_keeps_the_targets_whose_first_number_is_given(layers: set[int]) -> None:
    """Law: a target is in layer 1 if the first number of its path is 1."""
    expected = [path for path in ALL if int(path.split(".")[1]) in layers]
    assert chosen(Net(), "all-linear", layers=tuple(layers)) == expected


def test_only_the_first_number_of_a_path_is_its_layer() -> None:
    """Law: T5's block.0.layer.1 is in layer 0."""
    model = nn.ModuleDict({"block": nn.ModuleList([nn.ModuleList([nn.Linear(1, 1) for _ in range(2)])] * 1)})
    assert chosen(model, "all-linear", layers=[0]) == ["block.0.0", "block.0.1"]


def test_exclude_takes_the_same_patterns_and_a_container_with_all_in_it() -> None:
    """Law: a module that exclude matches is no target, nor is anything inside it."""
    assert chosen(Net(), "all-linear", exclude=["key"]) == [path for path in ALL if "key" not in path]
    assert chosen(Net(), "all-linear", exclude=["layers.[01].*", r"re:.*\.mlp"]) == ALL[6:8]
    assert chosen(Net(), "all-linear", exclude=["attention"]) == [path for path in ALL if path.endswith("mlp")]


def test_what_is_trained_in_full_is_never_a_target_of_a_broad_pattern() -> None:
    """Law: nothing at or below a path in `trained` is selected; everything else is."""
    with silent():
        assert chosen(Net(), "all-linear", trained=["layers.1", "layers.0.mlp"]) == [*ALL[:2], *ALL[6:]]
    assert chosen(Net(), "*.mlp", trained=["layers.1"]) == ["layers.0.mlp", "layers.2.mlp"]
    assert chosen(Net(), "*.mlp", trained=["layers.1.ml"]) == ALL[2::3]


def test_the_modules_of_other_adapters_are_invisible() -> None:
    """Law: no pattern matches a path through a child named tunerkit; the layer with that child still matches."""
    model = Net()
    model.get_submodule("layers.0.mlp").add_module("tunerkit", nn.ModuleDict({"default": nn.Linear(4, 4)}))
    assert chosen(model, "all-linear") == ALL
    assert chosen(model, "*.mlp*") == ALL[2::3]
    with pytest.raises(TargetError, match="no module named 'default'"):
        chosen(model, "default")
    with pytest.raises(TargetError, match="no module named"):
        targets.from_paths(scanned(model), ["layers.0.mlp.tunerkit.default"])


def test_a_module_registered_twice_is_one_target_under_its_first_path_and_found_by_both() -> None:
    """Law: sharing a module is not tying a weight: all its users get the adapter."""
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"first": layer, "second": layer})
    with silent():
        assert chosen(model, ["first", "second"]) == ["first"]
        assert chosen(model, "second") == ["first"]
    with pytest.raises(TargetError, match="nothing to adapt"):
        chosen(model, "all-linear", exclude=["second"])


def test_selection_changes_nothing() -> None:
    """Law: selection has no side effects."""
    model = Net()
    before = [(name, id(module), list(module._forward_hooks)) for name, module in model.named_modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    chosen(model, "all-linear", exclude=["key"], layers=[1])
    assert before == [(name, id(module), list(module._forward_hooks)) for name, module in model.named_modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# What is refused


def test_every_problem_is_named_at_once_with_the_closest_names() -> None:
    """Law: targets, exclude and layers together raise one error."""
    with pytest.raises(TargetError) as caught:
        chosen(Net(), ["qeury", "attention.kye", "norm", "mlp"], exclude=["embde"], layers=[1, 7])
    text = str(caught.value)
    assert "no module named 'qeury'; did you mean 'query'" in text
    assert "no module named 'attention.kye'; did you mean 'attention.key'" in text
    assert "layers.1.norm: is a LayerNorm, which cannot be adapted" in text
    assert "exclude: no module named 'embde'; did you mean 'embed'" in text
    assert "no layer 7; its layers are 0 to 2" in text


def test_a_misspelt_full_path_gets_the_full_path_as_hint() -> None:
    """Law: the hint has as many components as the name."""
    with pytest.raises(TargetError, match=r"did you mean 'layers\.0\.attention\.query'"):
        chosen(Net(), "layers.0.attention.quary")


@pytest.mark.parametrize("wanted", ["*.qeury", r"re:.*\.qeury"])
def test_a_glob_or_regular_expression_that_matches_nothing_is_an_error(wanted: str) -> None:
    """Law: every pattern must match something, also in a list with patterns that match."""
    with pytest.raises(TargetError, match="no module named"):
        chosen(Net(), ["mlp", wanted])


def test_a_broad_pattern_that_matches_only_what_cannot_be_adapted_is_an_error() -> None:
    """Law: matching only a norm counts as matching nothing; the error says what was matched."""
    with pytest.raises(TargetError, match=r"'\*norm' matches nothing that can be adapted:\nlayers\.0\.norm and 2 more"):
        chosen(Net(), ["mlp", "*norm"])


@pytest.mark.parametrize(
    ("wanted", "options", "words"),
    [
        ([], {}, "targets is empty"),
        ("mlp", {"exclude": ["layers"]}, "nothing to adapt"),
        ("mlp", {"layers": []}, "layers is empty"),
        ("embed", {"layers": [0]}, "nothing to adapt"),
        ("mlp", {"layers": [-1]}, "no layer -1"),
        ("", {}, "no module named ''"),
        ("all_linear", {}, "did you mean 'all-linear'"),
    ],
)
def test_an_empty_choice_is_an_error(wanted: list[str] | str, options: dict[str, list[int]], words: str) -> None:
    """Law: a model is never wrapped without targets."""
    with pytest.raises(TargetError, match=words):
        chosen(Net(), wanted, **options)


def test_a_plain_name_trained_in_full_is_refused() -> None:
    """Law: requesting one layer by name both as a target and for full training is a contradiction."""
    with pytest.raises(TargetError, match=r"layers\.1\.mlp: is trained in full \(train_modules\)"):
        chosen(Net(), "mlp", trained=["layers.1"])
    assert chosen(Net(), "mlp", trained=["layers.1"], exclude=["layers.1"]) == ["layers.0.mlp", "layers.2.mlp"]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.attention = OwnAttention(4, 2)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *args: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.out_proj(self.in_proj_weight)  # type: ignore[no-any-return]


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.experts = Experts()


def odd(make: Callable[[], nn.Module]) -> nn.ModuleDict:
    """A model of an ordinary layer and an unusual one."""
    return nn.ModuleDict({"body": nn.Linear(4, 4), "odd": make()})


def tied_pair() -> nn.ModuleDict:
    """An ordinary layer, and a head tied to an embedding."""
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "odd": nn.Linear(4, 8), "embed": nn.Embedding(8, 4)})
    model["odd"].weight = model["embed"].weight
    return model


def held_twice() -> nn.ModuleDict:
    """A layer whose forward() attention bypasses, and that another module may call."""
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "attention": nn.MultiheadAttention(4, 2)})
    model["proj"] = model.get_submodule("attention.out_proj")
    return model


UNFIT = [
    pytest.param(Attending, "attention", "attention: nn.MultiheadAttention with a forward of its own", id="attention"),
    pytest.param(Attending, "out_proj", r"attention\.out_proj: nn.MultiheadAttention", id="inside attention"),
    pytest.param(
        lambda: odd(lambda: nn.MultiheadAttention(4, 2, kdim=3)), "odd", "odd: .* with kdim or vdim", id="kdim"
    ),
    pytest.param(lambda: held_twice(), "proj", "attention.out_proj: is held by several", id="read and called"),
    pytest.param(
        lambda: odd(lambda: nn.Linear(4, 4, device="meta")), "odd", "odd: has its weight on the meta", id="meta"
    ),
    pytest.param(tied_pair, "odd", r"odd: has a tied weight, shared as odd\.weight, embed\.weight", id="tied"),
    pytest.param(lambda: odd(lambda: OwnForward(4, 4)), "odd", "odd: is a OwnForward", id="own forward"),
    pytest.param(lambda: odd(lambda: nn.Embedding(4, 4, max_norm=1.0)), "odd", "odd: has max_norm set", id="max_norm"),
    pytest.param(
        Mixture, "down_proj", r"is a stack of matrices in one parameter \(experts\.down_proj\), and no", id="expert"
    ),
]


@pytest.mark.parametrize(("make", "name", "words"), UNFIT)
def test_a_plain_name_for_what_cannot_be_adapted_is_refused(
    make: Callable[[], nn.Module], name: str, words: str
) -> None:
    """Law: it is never skipped silently, even if other names match."""
    with pytest.raises(TargetError, match=words):
        chosen(make(), ["body", name])


@pytest.mark.parametrize(("make", "name", "words"), UNFIT)
@pytest.mark.parametrize("wanted", ["*o*", "re:.*", "all-linear", None])
def test_a_broad_pattern_warns_about_what_it_left_out(
    make: Callable[[], nn.Module], name: str, words: str, wanted: str | None
) -> None:
    """Law: one warning has the path of everything that may have been meant; the rest is selected."""
    if words.startswith("odd: has max_norm") and wanted in ("all-linear", None):
        with silent():  # an embedding is not a linear layer
            assert chosen(make(), wanted) == ["body"]
        return
    with pytest.warns(TunerkitWarning, match="left out") as caught:
        selected = chosen(make(), wanted)
    owner = {"out_proj": "attention"}.get(name, name)
    assert len(caught) == 1
    assert f"{owner}: " in str(caught[0].message)
    assert caught[0].filename == __file__
    assert not any(path == name or path.endswith("." + name) for path in selected)
    assert "body" in selected


@pytest.mark.parametrize(("make", "name", "words"), UNFIT)
def test_excluded_modules_trigger_no_warning(make: Callable[[], nn.Module], name: str, words: str) -> None:
    """Law: with exclude a user says that leaving modules out is intended."""
    top = {"out_proj": "attention", "down_proj": "experts"}.get(name, name)
    with silent():
        assert "body" in chosen(make(), "all-linear", exclude=[top])
        assert "body" in chosen(make(), "*", exclude=[top, "embed"] if make is tied_pair else [top])


def test_attention_is_one_linear_layer_and_its_output_projection_another() -> None:
    """Law: by either's name, by a glob and by all-linear; with kdim only the output projection can be adapted."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.TransformerEncoderLayer(4, 2, 4) for _ in range(2)])})
    both = ["layers.0.self_attn", "layers.0.self_attn.out_proj"]
    with silent():
        linear = [f"layers.{layer}.{name}" for layer in "01" for name in ("self_attn", "self_attn.out_proj")]
        assert [path for path in chosen(model, "all-linear") if "self_attn" in path] == linear
        assert chosen(model, ["self_attn", "out_proj"], layers=[0]) == both
        assert chosen(model, "self_attn", layers=[0]) == both[:1]
        assert chosen(model, "layers.0.self_attn*") == both
        assert chosen(model, "all-linear", exclude=["self_attn"], layers=[0]) == [
            "layers.0.linear1",
            "layers.0.linear2",
        ]
        assert chosen(odd(lambda: nn.MultiheadAttention(4, 2, kdim=3)), "out_proj") == ["odd.out_proj"]


def test_a_glob_lists_the_norms_it_matched_in_one_line() -> None:
    """Law: paths that differ only by their numbers are one line, with the first path and a count."""
    with pytest.warns(TunerkitWarning, match=r"layers\.0\.norm and 2 more like it: is a LayerNorm"):
        assert chosen(Net(), "layers.*") == ALL


def test_an_expert_tensor_named_like_layers_triggers_a_warning() -> None:
    """Law: if a plain name matches layers and expert tensors, the layers are adapted and the tensors are reported."""
    model = nn.ModuleDict({"dense": nn.ModuleDict({"down_proj": nn.Linear(4, 4)}), "experts": Experts()})
    with pytest.warns(TunerkitWarning, match=r"experts\.down_proj: is a stack of matrices"):
        assert chosen(model, "down_proj") == ["dense.down_proj"]


def test_stacks_of_matrices_are_not_all_called_experts() -> None:
    """Law: XLNet's heads and a bilinear form are reported as what they are, for broad patterns and for names."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Parameter(torch.zeros(4, 2, 2))
            self.form = nn.Bilinear(2, 3, 4)
            self.fc = nn.Linear(4, 4)

    with pytest.warns(TunerkitWarning) as caught:
        assert chosen(nn.Sequential(Heads()), "all-linear") == ["0.fc"]
    for name in ("0.q", r"0.form.weight"):
        assert f"{name}: is a stack of matrices in one parameter (of experts or attention heads" in str(
            caught[0].message
        )
    with pytest.raises(TargetError, match=r"'q' is a stack of matrices in one parameter \(0\.q\), and no module"):
        chosen(nn.Sequential(Heads()), "q")


def test_expert_tensors_that_are_trained_in_full_trigger_no_warning() -> None:
    """Law: only modules that are neither adapted nor trained are reported."""
    with silent():
        assert chosen(Mixture(), "all-linear", trained=["experts"]) == ["body"]


def test_a_default_reports_layers_that_cannot_be_adapted_but_not_those_it_does_not_name() -> None:
    """Law: a default's names leave layers out on purpose; a layer of an unknown kind may have been meant."""
    model = Net()
    model.config = type("Config", (), {"model_type": "bert"})()  # type: ignore[assignment]
    model.get_submodule("layers.0").add_module("router", OwnForward(4, 4))
    with pytest.warns(TunerkitWarning) as caught:
        assert chosen(model, None) == [path for path in ALL if not path.endswith("mlp")]
    assert str(caught[0].message).splitlines()[1:] == ["  layers.0.router: is a OwnForward, which cannot be adapted"]


# Ties


def test_tied_names_every_parameter_that_several_modules_hold() -> None:
    """Law: a tie is one Parameter object under several full names; a shared module alone is no tie."""
    model = tied_pair()
    model["again"] = model["body"]
    model["body"].add_module("tunerkit", tied_pair())  # adapters may share parameters with each other
    assert dict(scanned(model).sharers) == {id(model["embed"].weight): ("odd.weight", "embed.weight")}


def test_training_a_module_whose_parameter_lives_elsewhere_too_is_refused() -> None:
    """Law: a copy would break the tie; a tie that is wholly inside the copied module stays."""
    model = nn.ModuleDict({"inner": tied_pair(), "other": nn.Linear(2, 2)})
    targets.refuse_tied(scanned(model), ["inner", "other"])
    with pytest.raises(TargetError, match=r"inner\.odd\.weight is tied to inner\.embed\.weight"):
        targets.refuse_tied(scanned(model), ["other", "inner.odd"])
    with pytest.raises(TargetError, match="is tied to"):
        targets.refuse_tied(scanned(model), ["inner.odd", "inner.embed"])


def test_refuse_unfit_names_every_target_that_must_not_be_adapted() -> None:
    """Law: a target that select rejects for its weight is rejected too if it comes from elsewhere."""
    model = nn.ModuleDict({"attending": Attending(), "pair": tied_pair()})
    targets.refuse_unfit(scanned(model), targets.from_paths(scanned(model), ["attending.body", "pair.body"]))
    unfit = targets.from_paths(scanned(model), ["attending.attention.out_proj", "pair.body", "pair.odd"])
    with pytest.raises(TargetError) as caught:
        targets.refuse_unfit(scanned(model), unfit)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [unfit[0].path, unfit[2].path]


# Modules by name


def test_resolve_modules_gives_the_outermost_modules_in_model_order() -> None:
    """Law: a module inside another match is not listed again."""
    model = Net()
    assert targets.resolve_modules(scanned(model), ["classifier", "embed"], what="train_modules") == (
        "embed",
        "classifier",
    )
    assert targets.resolve_modules(scanned(model), ["0", "classifier.0", "mlp"], what="x") == (
        *("layers.0", "layers.1.mlp", "layers.2.mlp", "classifier.0"),
    )
    assert targets.resolve_modules(scanned(model), ["classifier*"], what="x") == ("classifier",)
    assert targets.resolve_modules(scanned(model), [], what="x") == ()


def test_resolve_modules_names_every_name_that_matches_nothing() -> None:
    """Law: the error says where the name was given, and lists the closest names."""
    with pytest.raises(TargetError) as caught:
        targets.resolve_modules(scanned(Net()), ["clasifier", "nrom", "mlp"], what="train_modules")
    first, second = str(caught.value).splitlines()
    assert first.startswith("train_modules: no module named 'clasifier'; did you mean 'classifier'")
    assert second.startswith("train_modules: no module named 'nrom'; did you mean 'norm'")


def test_from_paths_takes_exact_paths_only_and_names_all_that_are_missing() -> None:
    """Law: a file's paths are exact: no suffix, no pattern, and not the model itself."""
    model = Net()
    assert [target.path for target in targets.from_paths(scanned(model), ["layers.1.mlp", "embed"])] == [
        "layers.1.mlp",
        "embed",
    ]
    with pytest.raises(TargetError) as caught:
        targets.from_paths(scanned(model), ["mlp", "embed", "", "layers.*.mlp", "re:("])
    assert str(caught.value).count("no module named") == 4


def test_from_paths_names_the_first_of_many_missing_paths_and_counts_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Law: a file of another architecture is rejected quickly: finding the closest names of all paths would be slow."""
    found = scanned(nn.ModuleDict({"body": nn.ModuleList(Net() for _ in range(80))}))
    wanted = [f"model.layers.{layer}.{name}" for layer in range(80) for name in ALL[:7]]
    searched: list[str] = []

    def search(path: str, names: Any) -> str:
        searched.append(path)
        return closest(path, names)

    monkeypatch.setattr(targets.resolution, "closest", search)
    with pytest.raises(TargetError) as caught:
        targets.from_paths(found, wanted)
    *named, last = str(caught.value).splitlines()
    assert searched == wanted[: len(searched)]
    assert 4 <= len(searched) <= 10
    hints = [closest(path, found.by_path) for path in searched]
    plain = [f"no module named {path!r}" for path in wanted[: len(named)]]
    assert named == [line + hint for line, hint in itertools.zip_longest(plain, hints, fillvalue="")]
    assert "did you mean" in named[0]
    assert last == f"and {560 - len(named)} more modules that it lacks"
    assert 4 <= len(named) <= 58


def test_each_module_is_asked_once_for_its_kind() -> None:
    """Law: asking every plugin about a module is costly; a module that is registered twice is asked about once."""
    asked: list[nn.Module] = []

    class Kind(ConvLayer):  # type: ignore[misc]  # final: nobody else may derive from it
        @classmethod
        def matches(cls, module: nn.Module) -> bool:
            asked.append(module)
            return False

    model = Net()
    model.again = model.embed
    found = targets.scan(model, Knowledge((Kind,), (), ()))
    with pytest.raises(TargetError):
        targets.choose_biases(found, "all", (), targets.choose_copies(found, ("embed",)))
    with pytest.raises(TargetError):
        targets.select(found, targets="all-linear")
    assert asked == list(model.modules())


# Architectures

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {**TINY, "num_key_value_heads": 1, "head_dim": 8}
IMAGE = {key: TINY[key] for key in list(TINY)[1:5]} | {"image_size": 32, "patch_size": 16}
GPT = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
BART = {"vocab_size": 32, "d_model": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | {
    f"{side}_{size}": value
    for side in ("encoder", "decoder")
    for size, value in {"layers": 2, "ffn_dim": 32, "attention_heads": 2}.items()
}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
SPEECH = {"conv_dim": [8], "conv_stride": [2], "conv_kernel": [3], "num_feat_extract_layers": 1} | {
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
LLAMAS = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi3", "Granite", "Cohere"]
LLAMAS += ["Olmo", "Olmo2", "SmolLM3", "StableLm"]
ARCHITECTURES: list[tuple[str, str, Mapping[str, object]]] = [
    ("BertForSequenceClassification", "BertConfig", {**TINY}),
    ("BertForMaskedLM", "BertConfig", {**TINY}),
    ("RobertaForSequenceClassification", "RobertaConfig", {**TINY}),
    ("ElectraForSequenceClassification", "ElectraConfig", {**TINY, "embedding_size": 8}),
    ("DebertaV2ForSequenceClassification", "DebertaV2Config", TINY | DISENTANGLED),
    (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 32, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
    ),
    ("AlbertForMaskedLM", "AlbertConfig", {**TINY, "embedding_size": 8}),
    ("MPNetForSequenceClassification", "MPNetConfig", {**TINY}),
    ("ModernBertForSequenceClassification", "ModernBertConfig", {**TINY, "cls_token_id": 1, "sep_token_id": 2}),
    ("GPT2LMHeadModel", "GPT2Config", {**GPT}),
    ("GPT2LMHeadModel", "GPT2Config", {**GPT, "add_cross_attention": True}),
    ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**TINY}),
    (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {**TINY, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    ),
    ("BloomForCausalLM", "BloomConfig", {"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    ("FalconForCausalLM", "FalconConfig", {**TINY}),
    ("OPTForCausalLM", "OPTConfig", {**TINY, "ffn_dim": 32, "word_embed_proj_dim": 8}),
    ("PhiForCausalLM", "PhiConfig", {**TINY}),
    *[(f"{name}ForCausalLM", f"{name}Config", DECODER) for name in LLAMAS],
    ("Gemma3ForCausalLM", "Gemma3TextConfig", {**DECODER}),
    ("T5ForConditionalGeneration", "T5Config", {**T5}),
    ("MT5ForConditionalGeneration", "MT5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
    ("UMT5ForConditionalGeneration", "UMT5Config", {**T5}),
    ("BartForSequenceClassification", "BartConfig", {**BART}),
    ("WhisperForConditionalGeneration", "WhisperConfig", {**BART, "decoder_start_token_id": 1}),
    ("ViTForImageClassification", "ViTConfig", {**IMAGE}),
    ("DeiTForImageClassification", "DeiTConfig", {**IMAGE}),
    ("Dinov2ForImageClassification", "Dinov2Config", {**IMAGE}),
    ("CLIPModel", "CLIPConfig", {"text_config": {**TINY}, "vision_config": {**IMAGE}, "projection_dim": 8}),
    ("CLIPVisionModel", "CLIPVisionConfig", {**IMAGE}),
    ("SiglipTextModel", "SiglipTextConfig", {**TINY, "projection_size": 16}),
    ("Wav2Vec2ForCTC", "Wav2Vec2Config", TINY | SPEECH),
]


def tiny(model_class: str, config_class: str, options: Mapping[str, object]) -> Any:
    """A small random model; nothing is downloaded."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**options))


@pytest.mark.parametrize(
    ("model_class", "config_class", "options"), ARCHITECTURES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_default_of_an_architecture_is_every_matrix_of_its_blocks_and_nothing_else(
    model_class: str, config_class: str, options: Mapping[str, object]
) -> None:
    """Law: exactly the linear layers inside numbered blocks: no pooler, head or projection beside them."""
    model = tiny(model_class, config_class, options)
    assert model.config.model_type in DEFAULTS
    expected = [
        path
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and re.search(r"\.\d+\.", path)
    ]
    with silent():
        assert chosen(model, None) == expected
    assert len(expected) >= 4


def test_every_name_of_every_tested_default_matches_somewhere() -> None:
    """Law: every name of a default matches in some architecture that shares it, except older vision names."""
    by_type: dict[str, set[str]] = {}
    for model_class, config_class, options in ARCHITECTURES:
        model = tiny(model_class, config_class, options)
        used = by_type.setdefault("|".join(DEFAULTS[model.config.model_type]), set())
        used.update(
            name
            for name in DEFAULTS[model.config.model_type]
            for path, _ in model.named_modules()
            if matches(name, path)
        )
    unused = {name for key, used in by_type.items() for name in key.split("|") if name not in used}
    assert unused <= {*DEFAULTS["bert"]}


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral"])
def test_a_mixture_of_experts_gets_its_attention_and_a_warning_about_experts_and_routers(name: str) -> None:
    """Law: an architecture without a default gets all-linear; experts and routers are not layers, and are reported."""
    experts = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    model = tiny(f"{name}ForCausalLM", f"{name}Config", DECODER | experts)
    with pytest.warns(TunerkitWarning) as caught:
        selected = chosen(model, None)
    assert {path.rpartition(".")[2] for path in selected} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "experts.gate_up_proj and 1 more like it: is a stack of matrices" in str(caught[0].message)
    assert "mlp.gate and 1 more like it: is a" in str(caught[0].message)
    with pytest.raises(TargetError, match="'down_proj' is a stack of matrices in one parameter"):
        chosen(model, ["q_proj", "down_proj"])


def test_an_attention_pooling_head_triggers_a_warning() -> None:
    """Law: SigLIP's nn.MultiheadAttention is inside a head, so a default leaves it out and reports it."""
    model = tiny("SiglipVisionModel", "SiglipVisionConfig", {**IMAGE})
    with pytest.warns(TunerkitWarning, match=r"head\.attention: nn\.MultiheadAttention"):
        assert len(chosen(model, None)) == 12


def test_gpt2_with_its_tied_head_named_is_refused_with_both_names() -> None:
    """Law: the error has the full names of the modules that share the weight."""
    model = tiny("GPT2LMHeadModel", "GPT2Config", {**GPT})
    with pytest.raises(TargetError, match=r"lm_head: .*transformer\.wte\.weight, lm_head\.weight"):
        chosen(model, ["c_attn", "lm_head"])
    with pytest.raises(TargetError, match=r"lm_head\.weight is tied to transformer\.wte\.weight"):
        targets.refuse_tied(scanned(model), ["lm_head"])


def test_the_default_of_a_convolutional_net_is_the_convolutions_of_its_blocks() -> None:
    """Law: in model order, without stem, head and depthwise convolutions, whose matrices are only kernel-wide."""
    with silent():
        assert chosen(ConvNet(), None) == ["layers.0.0", "layers.0.2", "layers.1.0", "layers.1.2"]
    assert chosen(ConvNet(), None, layers=[1], exclude=["layers.1.0"]) == ["layers.1.2"]
    assert chosen(ConvNet(), None, trained=["layers.1"]) == ["layers.0.0", "layers.0.2"]


def test_a_net_that_numbers_no_block_gets_all_its_convolutions_if_it_has_nothing_else() -> None:
    """Law: timm's RegNet names its blocks like that. With one linear layer outside the head, all-linear is used."""
    convolutions = nn.ModuleDict({name: nn.Conv2d(4, 4, 3) for name in ("b1", "b2")})
    assert chosen(nn.ModuleDict({"s1": convolutions, "head": nn.Linear(4, 2)}), None) == ["s1.b1", "s1.b2"]
    assert chosen(nn.ModuleDict({"s1": convolutions, "neck": nn.Linear(4, 2)}), None) == ["neck"]


def test_a_net_with_linear_layers_in_its_blocks_gets_these_by_default() -> None:
    """Law: convolutions are the default only if blocks contain no linear layer; "all-linear" never includes them."""
    assert chosen(ConvNet(lambda: nn.Linear(4, 4)), None) == ["layers.0.3", "layers.1.3", "fc"]
    assert chosen(ConvNet(), "all-linear") == ["fc"]
    with pytest.raises(TargetError, match=r'nothing to adapt.*with "all-linear" no conv'):
        chosen(nn.Sequential(nn.Conv2d(3, 3, 1)), "all-linear")


def test_a_default_reports_convolutions_that_cannot_be_adapted() -> None:
    """Law: a transposed convolution has no kind, so it is reported."""
    with pytest.warns(TunerkitWarning, match=r"layers\.0\.3 and 1 more like it: is a ConvTranspose2d"):
        assert len(chosen(ConvNet(lambda: nn.ConvTranspose2d(4, 4, 3)), None)) == 4


def test_a_known_model_type_with_other_modules_falls_back_to_all_linear() -> None:
    """Law: a default that matches nothing is ignored."""
    model = Net()
    model.config = type("Config", (), {"model_type": "llama"})()  # type: ignore[assignment]
    assert chosen(model, None) == ALL


class Listed(nn.Module):
    """Two layers, behind methods as old code wrote them."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.r = nn.Linear(4, 4)

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Any:  # type: ignore[override]
        return super().named_parameters(prefix, recurse)

    def parameters(self) -> Any:  # type: ignore[override]
        return [parameter for parameter in super().parameters() if parameter.requires_grad]


@pytest.mark.parametrize(("targets", "expected"), [("q", ["0.q"]), ("*", ["0.q", "0.r", "1"]), (None, None)])
def test_a_module_may_override_how_it_lists_its_parameters(targets: Any, expected: list[str] | None) -> None:
    """Law: selection reads what a module holds, and calls none of the methods that a model may override."""
    assert chosen(nn.Sequential(Listed(), nn.Linear(4, 4)), targets) == (expected or ["0.q", "0.r", "1"])
    with pytest.raises(TargetError, match="no module named 'z'"):
        chosen(Listed(), "z")


class Names(nn.Module):
    """A module that names an output head, wherever it lies."""

    def __init__(self, head: nn.Module | None = None, **children: nn.Module) -> None:
        super().__init__()
        self.found = [head if head is not None else self]
        for name, child in children.items():
            self.add_module(name, child)

    def get_output_embeddings(self) -> nn.Module:
        return self.found[0]


def test_any_module_may_name_a_head_that_lies_elsewhere() -> None:
    """Law: all modules are asked first, those without children too; a module may name itself."""
    other = nn.Linear(4, 4)
    model = nn.ModuleDict({"inner": Names(other, q=nn.Linear(4, 4)), "other": other, "q": nn.Linear(4, 4)})
    assert chosen(model, None) == ["inner.q", "q"]
    assert chosen(nn.ModuleDict({"a": Names(other), "b": other, "c": nn.Linear(4, 4)}), None) == ["c"]
    assert chosen(nn.ModuleDict({"a": Names(q=nn.Linear(4, 4)), "b": nn.Linear(4, 4)}), None) == ["b"]


def test_a_model_that_contains_itself_is_refused() -> None:
    """Law: its paths have no end, and the error says where it begins again."""
    model = nn.ModuleDict({"a": nn.ModuleDict({"l": nn.Linear(4, 4)})})
    model["a"].add_module("parent", model)
    with pytest.raises(TargetError, match=r"the model contains itself, at 'a\.parent\.a"):
        chosen(model, None)


def test_a_shared_layer_has_a_default_name_by_its_first_path_only() -> None:
    """Law: the architecture's names apply if a first path has one; else all linear layers are chosen."""
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"foo": shared, "layers": nn.ModuleDict({"q_proj": shared, "y": nn.Linear(4, 4)})})
    model.config = types.SimpleNamespace(model_type="llama")  # type: ignore[assignment]
    assert chosen(model, None) == ["foo", "layers.y"]


def test_the_model_itself_is_excluded_by_no_pattern() -> None:
    """Law: a pattern that matches the empty path alone matches nothing."""
    with pytest.raises(TargetError, match="exclude: no module named"):
        chosen(nn.ModuleDict({"a": nn.Linear(4, 4)}), None, exclude=("re:(x)?",))
