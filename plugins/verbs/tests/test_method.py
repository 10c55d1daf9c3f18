"""A method that is one function: its config, its adapter, its hooks, and what is refused."""

import copy
import pickle
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit.errors import ConfigError, PluginError, TargetError
from tunerkit.layers import LinearLayer
from tunerkit.plugin import BaseLayer, Factors, Gain, parameter, setting
from tunerkit_testing.registering import registered
from tunerkit_testing.small import net, train, trainable

TARGETS = {"targets": ["0", "2"]}
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))


@tunerkit.method("entry-by-entry")
def dense(
    a: Tensor = parameter("out", "rank", start=nn.init.normal_),
    b: Tensor = parameter("rank", "in"),
    rank: int = setting(2, ge=1, doc="rank of the product before it is squared"),
    factor: float = setting(3.0, gt=0, doc="the scale"),
    dropout: float = setting(0.0, ge=0, lt=1, doc="share of the input that is dropped"),
) -> Tensor:
    """ΔW = factor · (A B) ∘ (A B)."""
    return factor * (a @ b).square() + factor * (a @ b)


@tunerkit.method("product")
def product(
    q: Tensor = parameter("rank", "in", start=partial(nn.init.normal_, std=0.5), trained=False),
    p: Tensor = parameter("out", "rank"),
    rank: int = setting(2, ge=1, doc="rank at each target"),
) -> Factors:
    """ΔW = P Q, where Q is fixed."""
    return Factors(q=q, p=p)


@tunerkit.method("gains")
def gains(g: Tensor = parameter("out", start=1.0)) -> Gain:
    """Multiplies each output."""
    return Gain(g)


def _blocks(base: BaseLayer, config: Any) -> Mapping[str, int]:
    if base.out_features % config.blocks:
        raise TargetError(f"blocks is {config.blocks}, and {base.out_features} outputs cannot be cut into as many")
    return {"size": base.out_features // config.blocks}


@tunerkit.method("rows", sizes=_blocks)
def rows(
    weight: Tensor,
    g: Tensor = parameter("blocks", "size"),
    blocks: int = setting(1, ge=1, doc="blocks of rows"),
) -> Tensor:
    """ΔW = diag(g) W."""
    return g.flatten()[:, None] * weight


EVERY = (dense, product, gains, rows)


@pytest.fixture(autouse=True, scope="module")
def _methods() -> Iterator[None]:
    with registered(*EVERY):
        yield


def trained(name: str, **settings: Any) -> nn.Module:
    """A wrapped network after some steps."""
    model = tunerkit.wrap(net(), name, {**TARGETS, **settings}, seed=0)
    train(model, torch.optim.SGD(trainable(model), lr=0.5), 5)
    return model


@pytest.mark.parametrize("plugin", EVERY, ids=lambda each: each.method.name)
def test_starts_at_the_base_trains_merges_and_loads(plugin: Any, tmp_path: Path) -> None:
    """The first output is the base's bit for bit; what was trained survives merging, unmerging, a copy and a file."""
    name = plugin.method.name
    assert torch.equal(tunerkit.wrap(net(), name, TARGETS)(X), net()(X))
    model = trained(name)
    adapted = model(X)
    assert (adapted - net()(X)).abs().max() > 1e-3
    tunerkit.merge(model)
    assert torch.allclose(model(X), adapted, atol=1e-5)
    tunerkit.unmerge(model)
    assert torch.equal(copy.deepcopy(model)(X), adapted)
    assert torch.equal(tunerkit.load(net(), tunerkit.save(model, tmp_path))(X), adapted)


def test_the_config_has_the_settings_with_their_ranges_and_the_docstring() -> None:
    """It is an attribute of the plugin, and what wrap takes as a mapping."""
    assert dense.config.__doc__ == "ΔW = factor · (A B) ∘ (A B)."
    assert tunerkit.structure("entry-by-entry", {"rank": 5}) == dense.config(rank=5)
    with pytest.raises(ConfigError, match=r"expected > 0, got -1\.0 @ \$\.factor"):
        dense.config(factor=-1.0)
    with pytest.raises(ConfigError, match="rnk"):
        tunerkit.wrap(net(), "product", {"rnk": 3})


def test_the_plugin_is_still_the_function() -> None:
    """It can be called, and so tested without a model."""
    a, b = torch.ones(3, 1), torch.full((1, 2), 2.0)
    assert torch.equal(dense(a, b, factor=1.0), torch.full((3, 2), 6.0))


@pytest.mark.parametrize("plugin", EVERY, ids=lambda each: each.method.name)
def test_survives_pickle(plugin: Any) -> None:
    """Spawned workers get the plugin by its name, and configs and adapters with it."""
    assert pickle.loads(pickle.dumps(plugin)) is plugin
    assert pickle.loads(pickle.dumps(plugin.config())) == plugin.config()
    adapter = tunerkit.tuner(tunerkit.wrap(net(), plugin.method.name, TARGETS)).adapters()["0"]
    assert pickle.loads(pickle.dumps(adapter)).state_dict().keys() == adapter.state_dict().keys()


def test_fixed_tensors_are_saved_and_never_trained() -> None:
    """``trained=False`` keeps a tensor at its start."""
    model = tunerkit.wrap(net(), "product", TARGETS, seed=0)
    before = {path: adapter.get_parameter("q").clone() for path, adapter in tunerkit.tuner(model).adapters().items()}
    train(model, torch.optim.SGD(trainable(model), lr=0.5), 3)
    for path, adapter in tunerkit.tuner(model).adapters().items():
        assert torch.equal(adapter.get_parameter("q"), before[path])


def test_a_product_has_a_rank_and_takes_no_other() -> None:
    """The size called rank is the adapter's; of a dense ΔW nothing says the rank. Tensors of another rank are refused.

    The function may compute with the setting, so that a file whose config says another rank would be another ΔW.
    """
    assert tunerkit.tuner(trained("product", rank=3)).ranks() == {"0": 3, "2": 3}
    assert tunerkit.tuner(trained("entry-by-entry")).ranks() == {"0": 0, "2": 0}
    small, large = (
        tunerkit.tuner(tunerkit.wrap(net(), "product", {**TARGETS, "rank": rank})).adapters()["0"] for rank in (2, 4)
    )
    with pytest.raises(RuntimeError, match="size mismatch"):
        small.load_state_dict(large.state_dict())
    assert small.rank == 2


def test_dropout_drops_inputs_in_training_alone() -> None:
    """Over many draws, the mean of what is added is what is added in eval mode."""
    model = trained("entry-by-entry", dropout=0.5)
    adapter = tunerkit.tuner(model).adapters()["0"]
    base = LinearLayer(cast(nn.Linear, model.get_submodule("0")))
    x, y = torch.ones(4000, 6), torch.zeros(4000, 8)
    adapter.eval()
    expected = adapter(base, x, y)
    adapter.train()
    drawn = adapter(base, x, y)
    assert not torch.equal(drawn, expected)
    assert torch.allclose(drawn.mean(0), expected.mean(0), atol=0.1 * float(expected.detach().abs().max()))


def test_reads_the_weight_in_fp32_on_a_base_in_bf16() -> None:
    """Decompositions and differences lose nothing, and the output keeps the dtype of the base."""
    seen: list[torch.dtype] = []

    def record(weight: Tensor, g: Tensor = parameter("out")) -> Tensor:
        seen.append(weight.dtype)
        return g[:, None] * weight

    with registered(tunerkit.method("recording")(record)):
        model = tunerkit.wrap(net().bfloat16(), "recording", TARGETS)
        assert model(X.bfloat16()).dtype == torch.bfloat16
    assert set(seen) == {torch.float32}


def test_says_what_it_reads() -> None:
    """Gains need the base's own output; a function that names weight or base reads the weight."""
    flags = {}
    for plugin in EVERY:
        adapter = tunerkit.tuner(tunerkit.wrap(net(), plugin.method.name, TARGETS)).adapters()["0"]
        flags[plugin.method.name] = (adapter.reads_output, adapter.reads_weight)
    assert flags == {
        "entry-by-entry": (False, False),
        "product": (False, False),
        "gains": (True, True),
        "rows": (False, True),
    }


def test_a_size_that_does_not_fit_is_refused_with_the_path() -> None:
    """What ``sizes`` raises names the target, and the model stays as it was."""
    model = net()
    with pytest.raises(TargetError, match=r"^2: .*blocks is 4, and 7 outputs"):
        tunerkit.wrap(model, "rows", {**TARGETS, "blocks": 4})
    assert torch.equal(model(X), net()(X))


def test_a_size_of_unknown_name_is_refused_with_the_closest() -> None:
    """A shape may name settings, what ``sizes`` gives, and the layer's features."""

    @tunerkit.method("misspelt")
    def misspelt(a: Tensor = parameter("out", "rnk"), rank: int = setting(2, ge=1, doc="rank")) -> Tensor:
        return a

    with (
        registered(misspelt),
        pytest.raises(PluginError, match=r"parameter 'a' with the size 'rnk'.*known are: rank, in, out.*'rank'"),
    ):
        tunerkit.wrap(net(), "misspelt", TARGETS)


def _no_annotation(a: Tensor = parameter("out", "in")):  # type: ignore[no-untyped-def]
    return a


def _no_default(wieght: Tensor, a: Tensor = parameter("out", "in")) -> Tensor:
    return a * wieght


def _nothing_trained(a: Tensor = parameter("out", "in", trained=False)) -> Tensor:
    return a


def _dense(a: Tensor = parameter("out", "in")) -> Tensor:
    return a


def _sized(a: Tensor = parameter("out", "size")) -> Tensor:
    return a


def _untyped(a: Tensor = parameter("out", "in"), rank=setting(2, doc="rank")) -> Tensor:  # type: ignore[no-untyped-def]
    return a


def _plain_default(a: Tensor = parameter("out", "in"), alpha: float = 8.0) -> Tensor:
    return alpha * a


def _unresolved(a: "Tenser" = parameter("out", "in")) -> Tensor:  # type: ignore[name-defined]  # noqa: F821
    return a  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_plain_default, r"argument 'alpha' with the default 8\.0; give it parameter\(...\) or setting\(...\)"),
        (_unresolved, r"annotation that cannot be read \(NameError: name 'Tenser' is not defined\)"),
        (_no_annotation, r"returns None; annotate what it returns: -> Tensor for ΔW, -> Factors or -> Gain"),
        (_no_default, r"argument 'wieght' without a default; give it parameter\(...\) or setting\(...\).*'weight'"),
        (_nothing_trained, r"no tensor that is trained; add an argument such as b: Tensor = parameter"),
        (_untyped, r"setting 'rank' without a type; annotate it, as in rank: int = setting"),
    ],
)
def test_a_signature_that_does_not_say_enough_is_refused(function: Any, message: str) -> None:
    """The error names the function, what is missing, and what to write."""
    with pytest.raises(PluginError, match=f"{function.__name__} .*{message}"):
        tunerkit.method("wrong")(function)


@pytest.mark.parametrize("name", ["delta", "rank", "training", "plugin", "settings", "forward", "_parameters"])
def test_a_parameter_named_like_a_part_of_every_adapter_is_refused(name: str) -> None:
    """Before it replaces that part, or torch says no more than that the attribute exists."""
    space: dict[str, Any] = {"Tensor": Tensor, "parameter": parameter}
    exec(f'def taking({name}: Tensor = parameter("out", "in")) -> Tensor: ...', space)
    with pytest.raises(
        PluginError, match=f"function taking has a parameter '{name}', .*; rename it, such as to {name}_"
    ):
        tunerkit.method("wrong")(space["taking"])


def test_a_parameter_named_weight_is_itself_and_not_w() -> None:
    """What has a default is not what core gives by name."""

    def named(weight: Tensor = parameter("out", "in", start=2.0)) -> Tensor:
        return weight - 2

    with registered(tunerkit.method("weight-of-its-own")(named)):
        assert torch.equal(tunerkit.wrap(net(), "weight-of-its-own", TARGETS)(X), net()(X))


def test_an_unknown_field_of_the_record_is_refused_with_the_closest() -> None:
    """The decorator takes what the record has."""
    with pytest.raises(PluginError, match=r"function _dense has the field 'need_steps'; .*statistics.*'needs_steps'"):
        tunerkit.method("wrong", need_steps=True)(_dense)


@pytest.mark.parametrize(
    ("answer", "words"), [(None, "returned None"), ({"size": 2.0}, r"\{'size': 2\.0\}"), (3, "returned 3")]
)
def test_sizes_that_are_no_mapping_to_ints_are_refused(answer: Any, words: str) -> None:
    """The error names the function, and what its sizes must return."""
    plugin = tunerkit.method("wrong-sizes", sizes=lambda base, config: answer)(_sized)
    with registered(plugin), pytest.raises(PluginError, match=rf"function _sized has sizes .*{words}.*must return"):
        tunerkit.wrap(net(), "wrong-sizes", TARGETS)


def test_a_size_that_is_no_whole_number_is_refused() -> None:
    """As torch would, but with the names of the function and the parameter."""

    def halved(a: Tensor = parameter("out", 2.5)) -> Tensor:  # type: ignore[arg-type]
        return a

    with registered(tunerkit.method("halved")(halved)), pytest.raises(PluginError, match=r"halved .*'a'.* size 2\.5"):
        tunerkit.wrap(net(), "halved", TARGETS)


@pytest.mark.parametrize(("declared", "answer"), [(Gain, "Tensor"), (Tensor, "Gain"), (Factors, "Tensor")])
def test_an_answer_of_another_type_than_its_annotation_is_refused(declared: Any, answer: str) -> None:
    """Gains and ΔW mean different things: neither may be taken for the other."""

    def other(a: Tensor = parameter("out", start=1.0)) -> Any:
        return a if answer == "Tensor" else Gain(a)

    other.__annotations__["return"] = declared
    message = f"other returned a (Parameter|{answer}), not a {declared.__name__}; annotate what it returns"
    with registered(tunerkit.method("other-answer")(other)), pytest.raises(PluginError, match=message):
        tunerkit.wrap(net(), "other-answer", TARGETS)


def _writes(weight: Tensor, g: Tensor = parameter("out")) -> Tensor:
    weight -= weight.mean()
    return g[:, None] * weight


def _writes_base(base: BaseLayer, g: Tensor = parameter("out")) -> Tensor:
    return g[:, None] * base.dense().mul_(2)


def _writes_data(base: BaseLayer, g: Tensor = parameter("out")) -> Tensor:
    base.module.get_parameter("weight").data.mul_(2)
    return g[:, None] * base.dense()


def _replaces_data(base: BaseLayer, g: Tensor = parameter("out")) -> Tensor:
    weight = base.module.get_parameter("weight")
    weight.data = 2 * weight.data
    return g[:, None] * base.dense()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [_writes, _writes_base, _writes_data, _replaces_data])
def test_a_write_into_the_base_is_refused_and_undone(function: Any, dtype: torch.dtype) -> None:
    """W is the base's own: nothing would put it back. In lower precision it is a copy, and refused all the same."""
    model, before = net().to(dtype), net().to(dtype).state_dict()
    with (
        registered(tunerkit.method("writing")(function)),
        pytest.raises(PluginError, match=f"{function.__name__} writes into the weight of a Linear.*a new tensor"),
    ):
        tunerkit.wrap(model, "writing", TARGETS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not tunerkit.adapters(model)


@pytest.mark.parametrize("use", [lambda model: model(X), tunerkit.merge], ids=["forward", "merge"])
def test_a_write_that_comes_later_is_found_in_that_call(use: Any) -> None:
    """No call is trusted because the first one was right."""

    def later(weight: Tensor, g: Tensor = parameter("out")) -> Tensor:
        return g[:, None] * (weight.sub_(1) if waits else weight)

    waits: list[int] = []
    with registered(tunerkit.method("later")(later)):
        model = tunerkit.wrap(net(), "later", TARGETS)
        model(X)
        waits.append(1)
        with pytest.raises(PluginError, match=r"later writes into the weight .* load the base again"):
            use(model)


def test_a_base_with_inf_adds_nothing_at_a_start_of_0() -> None:
    """Inf · 0 is NaN, which is no start that adds something."""

    def scaled(weight: Tensor, g: Tensor = parameter("out")) -> Tensor:
        return g[:, None] * weight

    model = net()
    with torch.no_grad():
        model.get_parameter("0.weight")[0, 0] = torch.inf
    with registered(tunerkit.method("scaled")(scaled)):
        assert tunerkit.adapters(tunerkit.wrap(model, "scaled", TARGETS))


SHAPES: dict[str, tuple[Any, str]] = {
    "a row": (lambda a: a[:1], "returned shape (1, 6) for '0'; it must be (8, 6)"),
    "turned": (lambda a: a.T, "returned shape (6, 8) for '0'; it must be (8, 6)"),
    "one more": (lambda a: a[None], "returned shape (1, 8, 6) for '0'; it must be (8, 6)"),
    "one factor": (lambda a: Gain(a[:1, 0] + 1), "returned shape (1,) for '0'; it must be (8,)"),
    "a column": (lambda a: Gain(a[:, :1] + 1), "returned shape (8, 1) for '0'; it must be (8,)"),
    "no dimension": (lambda a: Gain(a.sum() + 1), "returned shape () for '0'; it must be (8,)"),
    "q of one": (
        lambda a: Factors(a[:1, :1], a[:, :1]),
        "returned q of shape (1, 1) and p of shape (8, 1) for '0'; it must be q (r, 6) and p (8, r), with one r",
    ),
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_wrong_shape_is_refused_when_wrapping(case: str) -> None:
    """Torch would broadcast some of them: they would train, and fail at the first merge."""
    answer, words = SHAPES[case]

    def shaped(a: Tensor = parameter("out", "in")) -> Any:
        return answer(a)

    shaped.__annotations__["return"] = type(answer(torch.ones(8, 6)))
    with registered(tunerkit.method("shaped")(shaped)), pytest.raises(PluginError, match=re.escape(words)):
        tunerkit.wrap(net(), "shaped", TARGETS)


@pytest.mark.parametrize("answer", [lambda a: a, lambda a: Gain(a[:, 0]), lambda a: Factors(q=a, p=a @ a.T)])
def test_a_start_that_adds_something_is_refused_unless_it_is_declared(answer: Any) -> None:
    """Training would begin at another model than the base, and nobody would know."""

    def starting(a: Tensor = parameter("out", "in", start=0.5)) -> Any:
        return answer(a)

    starting.__annotations__["return"] = type(answer(torch.ones(8, 6)))
    model = net()
    with (
        registered(tunerkit.method("starting")(starting)),
        pytest.raises(PluginError, match=r"starting adds something to '0' at its start; .*start=\"rounding\""),
    ):
        tunerkit.wrap(model, "starting", TARGETS)
    assert torch.equal(model(X), net()(X))
    with registered(tunerkit.method("starting", start="rounding")(starting)):
        tunerkit.wrap(model, "starting", TARGETS)


def test_a_compiled_model_asks_nothing_and_is_one_graph() -> None:
    """What a function writes is counted in Python, which compiled code is spared."""
    model = trained("rows")
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), model(X))
