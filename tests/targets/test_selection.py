"""Target selection, compared with slow but obvious oracles and on odd modules."""

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from tests.support.model_checks import silent
from tests.support.target_models import ALL, ANY, Attending, Net, chosen, scanned, tied_pair
from tunerkit import targets
from tunerkit.errors import TargetError, TunerkitWarning
from tunerkit.records import DefaultTargets


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


def test_a_regular_expression_without_its_prefix_is_told_of_it() -> None:
    """In PEFT it needs none; here ``.*`` alone is a name or a glob."""
    with pytest.raises(TargetError, match=r"no module named '\.\*query';.* a regular expression begins with 're:'"):
        chosen(Net(), [".*query"])
    with pytest.raises(TargetError) as caught:
        chosen(Net(), ["re:.*qeury"])
    assert "begins with" not in str(caught.value)


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
def test_an_empty_choice_is_an_error(wanted: list[str] | str, options: dict[str, Any], words: str) -> None:
    """Law: a model is never wrapped without targets."""
    with pytest.raises(TargetError, match=words):
        chosen(Net(), wanted, **options)


def test_a_plain_name_trained_in_full_is_refused() -> None:
    """Law: requesting one layer by name both as a target and for full training is a contradiction."""
    with pytest.raises(TargetError, match=r"layers\.1\.mlp: is trained in full \(train_modules\)"):
        chosen(Net(), "mlp", trained=["layers.1"])
    assert chosen(Net(), "mlp", trained=["layers.1"], exclude=["layers.1"]) == ["layers.0.mlp", "layers.2.mlp"]


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.experts = Experts()


def odd(make: Callable[[], nn.Module]) -> Callable[[], nn.ModuleDict]:
    """Builds a model of an ordinary layer and an unusual one."""
    return lambda: nn.ModuleDict({"body": nn.Linear(4, 4), "odd": make()})


def held_twice() -> nn.ModuleDict:
    """A layer whose forward() attention bypasses, and that another module may call."""
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "attention": nn.MultiheadAttention(4, 2)})
    model["proj"] = model.get_submodule("attention.out_proj")
    return model


def weighted(name: str) -> Callable[[], nn.ModuleDict]:
    return odd(lambda: getattr(nn.utils.parametrizations, name)(nn.Linear(4, 4)))


WIDE, KDIM = ((0, 3), (3, 0), (0, 0)), odd(lambda: nn.MultiheadAttention(4, 2, kdim=3))
# What builds a model, the name of what cannot be adapted in it, and the reason.
UNFIT: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "attention": (Attending, "attention", "attention: nn.MultiheadAttention with its own forward"),
    "inside attention": (Attending, "out_proj", r"attention\.out_proj: nn.MultiheadAttention"),
    "kdim": (KDIM, "odd", "odd: .* with kdim or vdim"),
    "read and called": (held_twice, "proj", "attention.out_proj: is a child of several"),
    "meta": (odd(lambda: nn.Linear(4, 4, device="meta")), "odd", "odd: has its weight on the meta"),
    "tied": (tied_pair, "odd", r"odd: has a tied weight, shared as odd\.weight, embed\.weight"),
    "own forward": (odd(lambda: OwnForward(4, 4)), "odd", "odd: is a OwnForward"),
    "max_norm": (odd(lambda: nn.Embedding(4, 4, max_norm=1.0)), "odd", "odd: has max_norm set"),
    "complex": (odd(lambda: nn.Linear(4, 4, dtype=torch.complex64)), "odd", "odd: has complex"),
    **{
        f"{n} to {m}": (
            odd(partial(nn.Linear, n, m)),
            "odd",
            rf"odd: has an empty weight, of shape \({m}, {n}\).*exclude it",
        )
        for n, m in WIDE
    },
    **{n: (weighted(n), "odd", "odd: .*parametrization") for n in ("weight_norm", "spectral_norm", "orthogonal")},
    "expert": (Mixture, "down_proj", r"is a stack of matrices in one parameter of 'experts', a \w+, and"),
}
each_unfit = pytest.mark.parametrize(("make", "name", "words"), UNFIT.values(), ids=UNFIT)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("experts.down_proj", "in one parameter of 'experts', a Experts, and only modules can be named yet"),
        ("body.weight", "'body.weight' is a parameter of 'body', a Linear, .* yet: name 'body' to adapt its weight"),
        ("scale", "'scale' is a parameter of the model itself, and only modules can be named yet$"),
    ],
)
def test_a_parameter_is_said_to_be_one(pattern: str, words: str) -> None:
    """Its holder is named, and the layer where there is one: it is not called unknown."""
    model = Mixture()
    model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(TargetError, match=words):
        chosen(model, pattern)


@each_unfit
def test_a_plain_name_for_what_cannot_be_adapted_is_refused(
    make: Callable[[], nn.Module], name: str, words: str
) -> None:
    """Law: it is never skipped silently, even if other names match."""
    with pytest.raises(TargetError, match=words):
        chosen(make(), ["body", name])


@each_unfit
@pytest.mark.parametrize("wanted", ["*o*", "re:.*", "all-linear", None])
def test_a_broad_pattern_warns_about_what_it_left_out(
    make: Callable[[], nn.Module], name: str, words: str, wanted: str | None
) -> None:
    """Law: one warning has the path of everything that may have been meant; the rest is selected."""
    if words.startswith("odd: has max_norm") and wanted in ("all-linear", None):
        with silent():  # an embedding is not a linear layer
            assert chosen(make(), wanted) == ["body"]
        return
    model = make()
    with pytest.warns(TunerkitWarning, match="left out") as caught:
        selected = chosen(model, wanted)
    owner = {"out_proj": "attention"}.get(name, name)
    assert len(caught) == 1
    assert f"{owner}: " in str(caught[0].message)
    assert not any(path == name or path.endswith("." + name) for path in selected)
    assert "body" in selected


@each_unfit
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
        others = ["layers.0.linear1", "layers.0.linear2"]
        assert chosen(model, "all-linear", exclude=["self_attn"], layers=[0]) == others
        assert chosen(KDIM(), "out_proj") == ["odd.out_proj"]


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
    text = str(caught[0].message)
    for name in ("0.q", r"0.form.weight"):
        assert f"{name}: is a stack of matrices in one parameter that no plugin describes" in text
    with pytest.raises(TargetError, match=r"'q' is a stack of matrices in one parameter of '0', a \w+, and only"):
        chosen(nn.Sequential(Heads()), "q")


def test_expert_tensors_that_are_trained_in_full_trigger_no_warning() -> None:
    """Law: only modules that are neither adapted nor trained are reported."""
    with silent():
        assert chosen(Mixture(), "all-linear", trained=["experts"]) == ["body"]


def test_a_default_reports_layers_that_cannot_be_adapted_but_not_those_it_does_not_name() -> None:
    """Law: a default's names leave layers out on purpose; a layer of an unknown kind may have been meant."""
    model = Net()
    model.config = type("Config", (), {"model_type": "toy"})()  # type: ignore[assignment]
    model.get_submodule("layers.0").add_module("router", OwnForward(4, 4))
    with pytest.warns(TunerkitWarning) as caught:
        found = targets.select(scanned(model, DefaultTargets(("toy",), ("query", "key"))), targets=None, method=ANY)
    assert [target.path for target in found] == [path for path in ALL if not path.endswith("mlp")]
    assert str(caught[0].message).splitlines()[1:] == ["  layers.0.router: is a OwnForward, which cannot be adapted"]


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
    with pytest.raises(TargetError, match=r'nothing to adapt.*never convolutions with "all-linear"'):
        chosen(nn.Sequential(nn.Conv2d(3, 3, 1)), "all-linear")


def test_a_default_reports_convolutions_that_cannot_be_adapted() -> None:
    """Law: a transposed convolution has no kind, so it is reported."""
    with pytest.warns(TunerkitWarning, match=r"layers\.0\.3 and 1 more like it: is a ConvTranspose2d"):
        assert len(chosen(ConvNet(lambda: nn.ConvTranspose2d(4, 4, 3)), None)) == 4


def test_a_shared_layer_has_a_default_name_by_its_first_path_only() -> None:
    """Law: the architecture's names apply if a first path has one; else all linear layers are chosen."""
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"foo": shared, "layers": nn.ModuleDict({"q_proj": shared, "y": nn.Linear(4, 4)})})
    model.config = types.SimpleNamespace(model_type="llama")  # type: ignore[assignment]
    assert chosen(model, None, defaults=[DefaultTargets(("llama",), ("q_proj",))]) == ["foo", "layers.y"]


def test_the_model_itself_is_excluded_by_no_pattern() -> None:
    """Law: a pattern that matches the empty path alone matches nothing."""
    with pytest.raises(TargetError, match="exclude: no module named"):
        chosen(nn.ModuleDict({"a": nn.Linear(4, 4)}), None, exclude=("re:(x)?",))
