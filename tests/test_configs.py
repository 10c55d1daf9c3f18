"""The law of configs: strict, with complete error messages, and unchanged by a round trip."""

import copy
import enum
import inspect
import json
import math
import pickle
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import attrs
import numpy as np
import pytest
import torch
import yaml
from hypothesis import Phase, example, find, given, settings, strategies as st

from tests.support.config_checks import Kinds, Size, problems_of
from tunerkit.config import AdapterConfig, from_mapping, setting, unstructure
from tunerkit.errors import ConfigError
from tunerkit_testing.strategies import configs_of


@attrs.frozen
class Sample(AdapterConfig):
    """A config with a field of every kind."""

    rank: int = setting(8, ge=1, le=512, doc="An int in a range.")
    alpha: float = setting(16.0, gt=0, doc="A float.")
    dropout: float = setting(0.0, ge=0, lt=1, doc="A float in a half-open range.")
    t_init: int | float = setting(0.1, ge=0, doc="Steps, or a share.")
    total_steps: int | None = setting(None, ge=1, doc="An int that may be missing.")
    rank_scaled: bool = setting(False, doc="A bool.")
    unit: Literal["average", "total", 3] = setting("average", doc="One of a few.")
    ranks: Mapping[str, int] = setting(attrs.Factory(dict), ge=0, doc="An int for each name.")
    alphas: dict[str, float | None] = setting(attrs.Factory(dict), doc="A float for each name.")  # noqa: RUF009 (an attrs field)
    betas: tuple[float, float] = setting((0.85, 0.85), ge=0, lt=1, doc="A pair.")
    groups: tuple[tuple[int, ...], ...] | None = setting(None, doc="Lists in a list.")
    note: str = setting("", doc="A text.")

    def problems(self) -> Iterable[str]:
        """A check across fields."""
        if self.total_steps is not None and self.t_init > self.total_steps:
            yield f"expected t_init <= total_steps, got {self.t_init} > {self.total_steps} @ $.t_init"


FIELDS = {field.name: field for field in attrs.fields(Sample)}


class Colour(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize("kind", [Sample, Kinds])
@given(data=st.data())
def test_every_config_survives_json_and_yaml(kind: type[AdapterConfig], data: st.DataObject) -> None:
    """structure(unstructure(c)) == c, field by field and type by type, through both file formats."""
    config: Any = data.draw(configs_of(kind))
    plain, names = unstructure(config), [field.name for field in attrs.fields(kind)]
    assert list(plain) == names
    for again in (plain, json.loads(json.dumps(plain, allow_nan=False)), yaml.safe_load(yaml.safe_dump(plain))):
        assert again == plain
        copied: Any = from_mapping(kind, again)
        assert copied == config
        for name in names:
            assert type(getattr(copied, name)) is type(getattr(config, name))
    if isinstance(copied, Kinds):
        assert repr(copied.shape) == repr(config.shape)
        assert [type(each) for each in copied.several] == [float] * len(config.several)
    plain["ranks"]["new"] = 1
    plain["exclude"].append("new")
    assert config == copied  # what is plain is the caller's own


def test_values_of_subclasses_are_stored_as_plain_values() -> None:
    """Enum members and NumPy floats are stored as plain numbers or text, which YAML can write."""
    config = Sample(Size.BIG, np.float64(0.5), note=Colour.RED, targets=Colour.RED)
    assert (type(config.rank), type(config.alpha), type(config.note), type(config.targets)) == (int, float, str, str)
    assert from_mapping(Sample, yaml.safe_load(yaml.safe_dump(unstructure(config)))) == config


def test_own_fields_are_positional_and_shared_ones_are_not() -> None:
    """Sample(4) sets the rank; what every method shares is keyword-only."""
    assert Sample(4).rank == 4
    assert [name for name, field in FIELDS.items() if field.kw_only] == [
        field.name for field in attrs.fields(AdapterConfig)
    ]


def test_lists_become_tuples_and_mappings_are_copied() -> None:
    """The caller's list or dict may change afterwards; the config does not."""
    targets, ranks = ["q", "v"], {"q": 3}
    config = Sample(targets=targets, ranks=ranks, layers=[0, 1], betas=[0, 0.5], groups=[[1], []])  # type: ignore[arg-type]
    targets.append("k")
    ranks["k"] = 1
    assert config == Sample(targets=("q", "v"), ranks={"q": 3}, layers=(0, 1), betas=(0.0, 0.5), groups=((1,), ()))
    assert all(type(beta) is float for beta in config.betas)


def test_a_union_of_int_and_float_keeps_what_was_written() -> None:
    """8 steps stay an int and a share stays a float, whatever the order in the annotation."""

    @attrs.frozen
    class FloatFirst(AdapterConfig):
        start: float | int = setting(8, doc="Steps, or a share.")

    for start in (8, 0.25, 8.0):
        assert type(FloatFirst(start).start) is type(Sample(t_init=start).t_init) is type(start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_torch_dtype_is_stored_by_its_name(dtype: torch.dtype) -> None:
    """torch.bfloat16 and "bfloat16" are the same setting, in a call and in a mapping."""
    by_dtype: Any = dtype
    name: Any = str(dtype).split(".")[1]
    assert (
        Sample(adapter_dtype=by_dtype) == Sample(adapter_dtype=name) == from_mapping(Sample, {"adapter_dtype": dtype})
    )
    assert Sample(adapter_dtype=by_dtype).adapter_dtype == name


LONG = "model.encoder.layers.11.self_attn.q_proj"  # a name of usual length is shown whole
WRONG: list[tuple[str, object, str]] = [
    ("rank", 8.0, "expected int, got float 8.0 @ $.rank"),
    ("rank", None, "expected int, got None @ $.rank"),
    ("rank", [8], "expected int, got list [8] @ $.rank"),
    ("rank", 0, "expected >= 1, got 0 @ $.rank"),
    ("rank", 513, "expected <= 512, got 513 @ $.rank"),
    ("alpha", True, "expected float, got bool True @ $.alpha"),
    ("alpha", "much", "expected float, got str 'much' @ $.alpha"),
    ("alpha", math.inf, "expected a finite float of 32 bits, got float inf @ $.alpha"),
    ("alpha", 1e308, "expected a finite float of 32 bits, got float 1e+308 @ $.alpha"),
    ("alpha", -3.5e38, "expected a finite float of 32 bits, got float -3.5e+38 @ $.alpha"),
    ("alpha", 0, "expected > 0, got 0.0 @ $.alpha"),
    ("dropout", 1.0, "expected < 1, got 1.0 @ $.dropout"),
    ("t_init", -math.inf, "expected a finite float of 32 bits, got float -inf @ $.t_init"),
    ("t_init", False, "expected int or float, got bool False @ $.t_init"),
    ("t_init", -1, "expected >= 0, got -1 @ $.t_init"),
    ("total_steps", 0, "expected >= 1, got 0 @ $.total_steps"),
    ("unit", "parameter", "expected 'average' or 'total' or 3, got str 'parameter' @ $.unit"),
    ("unit", 3.0, "expected 'average' or 'total' or 3, got float 3.0 @ $.unit"),
    ("bias", None, "expected 'none' or 'adapters' or 'all', got None @ $.bias"),
    ("adapter_dtype", 8, "expected 'float32' or 'float64' or 'bfloat16' or 'float16', got int 8 @ $.adapter_dtype"),
    ("targets", 3, "expected str or list of str or None, got int 3 @ $.targets"),
    ("targets", ["q", 1], "expected str, got int 1 @ $.targets[1]"),
    ("exclude", LONG, f"expected list of str, got str '{LONG}' @ $.exclude"),
    ("train_modules", {"head"}, "expected list of str, got set {'head'} @ $.train_modules"),
    ("layers", [0, True], "expected int, got bool True @ $.layers[1]"),
    ("layers", "12", "expected list of int or None, got str '12' @ $.layers"),
    ("ranks", ["q"], "expected mapping of str to int, got list ['q'] @ $.ranks"),
    ("ranks", {"q": -1}, "expected >= 0, got -1 @ $.ranks['q']"),
    ("ranks", {7: 1}, "expected str, got int 7 @ $.ranks[7]"),
    ("alphas", {"q": math.nan}, "expected a finite float of 32 bits, got float nan @ $.alphas['q']"),
    ("betas", [0.1], "expected list of float and float, got 1 values @ $.betas"),
    ("betas", [0.1, 0.2, 0.3], "expected list of float and float, got 3 values @ $.betas"),
    ("betas", [0.1, 1], "expected < 1, got 1.0 @ $.betas[1]"),
    ("groups", [[1], [2, "3"]], "expected int, got str '3' @ $.groups[1][1]"),
    ("note", b"x", "expected str, got bytes b'x' @ $.note"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "problem"), WRONG, ids=[f"{name}={value}" for name, value, _ in WRONG])
def test_a_wrong_value_is_named_the_same_way_however_the_config_is_built(
    name: str, value: object, problem: str
) -> None:
    """A call and a mapping give the same line: what is allowed, what was passed, and where."""
    wrong: Any = {name: value}
    assert problems_of(lambda: Sample(**wrong)) == problems_of(lambda: from_mapping(Sample, wrong)) == [problem]


KINDS: dict[str, st.SearchStrategy[Any]] = {
    "int": st.integers(1, 9),
    "float": st.floats(0.1, 0.9),
    "bool": st.booleans(),
    "text": st.text(),
    "none": st.none(),
    "ints": st.lists(st.integers(1, 9), min_size=3, max_size=5),
    "texts": st.lists(st.text(), min_size=3, max_size=5),
    "mapping": st.dictionaries(st.text(), st.integers(1, 9), min_size=1, max_size=3),
}
# Which kinds each field takes, said by hand: the oracle for the checks made from annotations.
TAKES = {
    "targets": {"text", "none", "texts"},
    "exclude": {"texts"},
    "layers": {"none", "ints"},
    "train_modules": {"texts"},
    "bias": set(),
    "adapter_dtype": set(),
    "rank": {"int"},
    "alpha": {"int", "float"},
    "dropout": {"float"},
    "t_init": {"int", "float"},
    "total_steps": {"int", "none"},
    "rank_scaled": {"bool"},
    "unit": set(),
    "ranks": {"mapping"},
    "alphas": {"mapping"},
    "betas": set(),
    "groups": {"none"},
    "note": {"text"},
}
# Ints outside a range, or the one that a Literal has, would blur the question: these fields have tests of their own.
SPECIAL = {("dropout", "int"), ("unit", "int"), ("bias", "text"), ("adapter_dtype", "text"), ("unit", "text")}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(data=st.data())
def test_no_field_takes_a_value_of_another_kind(name: str, kind: str, data: st.DataObject) -> None:
    """A bool is no int, 8.0 is no int, text is neither a list nor a number: nothing is converted."""
    value = data.draw(KINDS[kind])
    if (name, kind) in SPECIAL:
        return
    if kind in TAKES[name]:
        assert getattr(from_mapping(Sample, {name: value}), name) == (tuple(value) if type(value) is list else value)
    else:
        lines = problems_of(lambda: from_mapping(Sample, {name: value}))
        assert lines
        assert all(re.search(rf" @ \$\.{name}(\[|$)", line) for line in lines)


# The smallest example is of no interest where the question is whether there is one.
UNSHRUNK = settings(phases=[Phase.generate], max_examples=500, database=None, derandomize=True)
LIMITS = st.one_of(st.none(), st.integers(-3, 3))


@settings(max_examples=200)
@given(LIMITS, LIMITS, LIMITS, LIMITS, st.integers(-5, 5), st.booleans())
def test_a_range_takes_exactly_the_numbers_inside_it(
    ge: int | None, gt: int | None, le: int | None, lt: int | None, value: int, as_float: bool
) -> None:
    """Ge and le include the limit, gt and lt exclude it; every limit that a value violates is named."""

    @attrs.frozen
    class Ranged(AdapterConfig):
        value: int | float = setting(0, ge=ge, gt=gt, le=le, lt=lt, doc="In a range.")

    number = float(value) if as_float else value
    missed = []
    if ge is not None and value < ge:
        missed.append(f"expected >= {ge}, got {number} @ $.value")
    if gt is not None and value <= gt:
        missed.append(f"expected > {gt}, got {number} @ $.value")
    if le is not None and value > le:
        missed.append(f"expected <= {le}, got {number} @ $.value")
    if lt is not None and value >= lt:
        missed.append(f"expected < {lt}, got {number} @ $.value")
    if missed:
        assert problems_of(lambda: Ranged(number)) == missed
    else:
        assert Ranged(number).value == number


def test_given_strategies_replace_the_drawn_ones() -> None:
    """configs_of(Sample, rank=...) draws the rank from the given strategy."""
    find(configs_of(Sample, rank=st.just(77)), lambda config: config.rank == 77, settings=UNSHRUNK)
    with pytest.raises(ConfigError, match=r"expected >= 1, got 0 @ \$\.rank"):
        find(configs_of(Sample, rank=st.just(0)), lambda config: True, settings=UNSHRUNK)


@given(st.sets(st.sampled_from(range(len(WRONG))), min_size=1))
def test_all_problems_are_named_at_once(chosen: set[int]) -> None:
    """However many fields are wrong, one error has a line for each, in field order."""
    by_name = {WRONG[index][0]: WRONG[index] for index in sorted(chosen)}
    wrong: Any = {name: value for name, value, _ in by_name.values()}
    lines = problems_of(lambda: from_mapping(Sample, wrong))
    assert lines == [by_name[name][2] for name in FIELDS if name in by_name]
    assert problems_of(lambda: Sample(**wrong)) == lines


def test_checks_across_fields_come_after_the_checks_of_each() -> None:
    """problems() is called only if every field is valid, because it may compute with them."""
    late = "expected t_init <= total_steps, got 9 > 5 @ $.t_init"
    assert problems_of(lambda: Sample(t_init=9, total_steps=5)) == [late]
    assert problems_of(lambda: from_mapping(Sample, {"t_init": 9, "total_steps": 5})) == [late]
    wrong: Any = "9"
    assert problems_of(lambda: Sample(t_init=wrong, total_steps=5)) == ["expected int or float, got str '9' @ $.t_init"]
    assert problems_of(lambda: Sample(0, t_init=9, total_steps=5)) == ["expected >= 1, got 0 @ $.rank"]


def test_unknown_keys_are_refused_with_the_closest_names() -> None:
    """A mistyped key is listed with its closest match, together with every other problem."""
    lines = problems_of(lambda: from_mapping(Sample, {"rnak": 4, "zzzzzz": 1, 3: 4, "alpha": "x"}))
    assert lines == [
        "unknown key 'rnak'; did you mean 'rank' or 'ranks'? @ $.rnak",
        f"unknown key 'zzzzzz'; known keys: {', '.join(FIELDS)} @ $.zzzzzz",
        "expected str keys, got int 3 @ $",
        "expected float, got str 'x' @ $.alpha",
    ]


@given(st.text().filter(lambda key: key not in FIELDS))
def test_no_unknown_key_is_ignored(key: str) -> None:
    """Every key that is not a setting is an error."""
    assert len(problems_of(lambda: from_mapping(Sample, {"rank": 4, key: 1}))) == 1


@pytest.mark.parametrize("key", [1, None, 1.5, True, ("rank",), b"rank"])
def test_keys_that_are_no_text_are_refused(key: object) -> None:
    """YAML allows any key type; a config accepts only text."""
    assert problems_of(lambda: from_mapping(Sample, {key: 1}))[0].startswith("expected str keys, got ")


@pytest.mark.parametrize("other", [[1], [], (), "rank", "", 1, None, True, {"rank"}, [("rank", 4)], Sample])
def test_what_is_no_mapping_is_refused(other: object) -> None:
    """[1] and None do not become a default config."""
    (line,) = problems_of(lambda: from_mapping(Sample, other))
    assert line.startswith("expected a mapping of settings, got ")
    assert line.endswith(" @ $")


def test_an_empty_mapping_is_the_default_config() -> None:
    """Every setting of Sample has a default."""
    assert from_mapping(Sample, {}) == Sample()


def test_a_setting_without_a_default_must_be_given() -> None:
    """A missing setting is listed together with the other problems."""

    @attrs.frozen
    class Needy(AdapterConfig):
        task: str = setting(doc="No default fits.")

    assert from_mapping(Needy, {"task": "x"}) == Needy("x")
    assert problems_of(lambda: from_mapping(Needy, {"layers": 1})) == [
        "missing, and it has no default @ $.task",
        "expected list of int or None, got int 1 @ $.layers",
    ]


@given(
    st.from_regex(r"\A[+-]?[0-9]{1,3}(\.[0-9]{0,3})?[eE][+-]?[0-9]{1,2}\Z"),
    st.sampled_from(["alpha", "t_init", "betas"]),
)
@example("1e-3", "alpha")
@example("5e5", "t_init")
def test_scientific_notation_that_yaml_reads_as_text_gets_a_hint(text: str, name: str) -> None:
    """YAML 1.1 reads 1e-3 as text; the hint is the same number in a form that YAML reads as a float."""
    loaded = yaml.safe_load(text)
    if not isinstance(loaded, str):
        assert loaded == float(text)
        return
    value = [loaded, 0.5] if name == "betas" else loaded
    (line,) = problems_of(lambda: from_mapping(Sample, {name: value}))
    hint = re.search(r"\(YAML reads this as text: write (.*)\) @ ", line)
    assert hint is not None
    assert yaml.safe_load(hint[1]) == float(text)


def test_ints_and_texts_get_no_hint_about_floats() -> None:
    """The hint appears only where a float would be right."""
    assert problems_of(lambda: from_mapping(Sample, {"rank": "1e3"})) == ["expected int, got str '1e3' @ $.rank"]
    assert problems_of(lambda: from_mapping(Sample, {"alpha": "e3"})) == ["expected float, got str 'e3' @ $.alpha"]
    assert from_mapping(Sample, {"note": "1e3"}).note == "1e3"


def test_long_and_odd_values_are_shown_short_and_on_one_line() -> None:
    """An error stays readable if the value is a tensor, a page of text or an array."""
    for value in (torch.zeros(40, 40), np.zeros((40, 40)), "x\n" * 5000, list(range(9999)), object()):
        for name in ("rank", "bias", "total_steps", "groups"):
            for line in problems_of(lambda name=name, value=value: from_mapping(Sample, {name: value})):  # type: ignore[misc]
                assert len(line) < 200
                assert "\n" not in line


def test_a_literal_tells_ints_from_bools() -> None:
    """True == 1 in Python, yet Literal[1] rejects True and Literal[True] rejects 1."""

    @attrs.frozen
    class Exact(AdapterConfig):
        one: Literal[1] = setting(1, doc="The int.")
        yes: Literal[True] = setting(True, doc="The bool.")

    assert problems_of(lambda: from_mapping(Exact, {"one": True, "yes": 1})) == [
        "expected 1, got bool True @ $.one",
        "expected True, got int 1 @ $.yes",
    ]


def test_a_mistyped_choice_is_answered_with_the_closest() -> None:
    """As for mistyped keys; a value that resembles no choice gets only the list."""

    @attrs.frozen
    class Choosing(AdapterConfig):
        which: Literal["adapters", "all"] = setting("all", doc="One of two.")
        perhaps: Literal["adapters", "all"] | None = setting(None, doc="One of two, or neither.")

    for value, hint in (("adaptors", "; did you mean 'adapters'?"), ("none of it", "")):
        for name in ("which", "perhaps"):
            (problem,) = problems_of(lambda name=name, value=value: from_mapping(Choosing, {name: value}))  # type: ignore[misc]
            assert problem.endswith(f"got str {value!r}{hint} @ $.{name}")


def test_a_range_is_about_numbers_alone() -> None:
    """None, bools and text in a field with a range are exempt; numbers in the same field are not."""

    @attrs.frozen
    class Mixed(AdapterConfig):
        value: int | bool | str | None = setting(None, ge=1, doc="A count, a switch or a name.")

    for value in (None, False, "", 1):
        assert Mixed(value).value is value
    assert problems_of(lambda: Mixed(0)) == ["expected >= 1, got 0 @ $.value"]


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**400])
def test_an_int_of_more_than_64_bits_is_refused(number: int) -> None:
    """Torch takes none as a size or a seed; where a float is allowed too, the int does not become one."""
    for name, value in (("t_init", number), ("layers", [0, number]), ("ranks", {"q": number})):
        with pytest.raises(ConfigError, match=r"^expected an int of 64 bits, got int .* @ [^\n]*$"):
            from_mapping(Sample, {name: value})
    assert (Sample(t_init=2**64 - 1).t_init, Sample(layers=(-(2**63),)).layers) == (2**64 - 1, (-(2**63),))
    assert Sample(alpha=3.4e38).alpha == 3.4e38  # near the largest of 32 bits
    assert "expected a finite float of 32 bits, got int 1000" in problems_of(lambda: Sample(alpha=10**400))[0]


def test_a_converter_that_fails_is_a_problem_with_a_path() -> None:
    """An exception of a converter becomes a line of the error, not a separate traceback."""

    def halve(value: Any) -> Any:
        return value / 2

    @attrs.frozen
    class Halved(AdapterConfig):
        half: float = setting(1.0, gt=0, converter=halve, doc="Half of what was given.")

    wrong: Any = "x"
    assert Halved(3.0).half == 1.5
    assert problems_of(lambda: Halved(wrong))[0].endswith("@ $.half")
    assert problems_of(lambda: from_mapping(Halved, {"half": wrong, "layers": 1}))[0].startswith("expected list of int")


def test_configs_are_frozen() -> None:
    """A built config can't be changed, and accepts no new attributes."""
    config: Any = Sample()
    for name in (*FIELDS, "new"):
        with pytest.raises((attrs.exceptions.FrozenInstanceError, AttributeError)):
            setattr(config, name, 1)
    assert config == Sample()


@given(configs_of(Sample))
def test_copies_and_pickles_are_equal_and_share_nothing(config: Sample) -> None:
    """Deepcopy and pickle give an equal config with separate mappings."""
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config
        assert copied.ranks is not config.ranks
        assert attrs.evolve(copied) == config
        with pytest.raises(ConfigError, match=">= 1, got 0"):  # a new config is built, so its fields are checked again
            attrs.evolve(copied, rank=0)


def test_the_base_config_is_abstract() -> None:
    """AdapterConfig has no method, so it can be neither built nor structured."""
    with pytest.raises(TypeError, match="AdapterConfig is abstract: build the config of a method"):
        AdapterConfig()
    with pytest.raises(TypeError, match="AdapterConfig is abstract"):
        from_mapping(AdapterConfig, {})


def test_what_is_no_config_class_is_refused_in_words() -> None:
    """Structure and unstructure say what they expect."""
    wrong: Any
    for wrong in (int, dict, Sample()):
        with pytest.raises(TypeError, match=r"derived from tunerkit\.plugin\.AdapterConfig, got "):
            from_mapping(wrong, {})
    for wrong in ({}, None, Sample):
        with pytest.raises(TypeError, match=r"derived from tunerkit\.plugin\.AdapterConfig, got "):
            unstructure(wrong)


def test_a_derived_class_that_is_no_attrs_class_is_refused() -> None:
    """Without the decorator its fields would be missing silently."""

    class Bare(AdapterConfig):
        rank: int = 8

    with pytest.raises(TypeError, match=r"Bare is not an attrs class: decorate it with @attrs\.frozen"):
        Bare()


def test_a_derived_class_that_switches_the_checks_off_is_refused() -> None:
    """The checks run in __attrs_post_init__; further checks belong into problems()."""
    with pytest.raises(TypeError, match=r"Loose overrides __attrs_post_init__.*override problems\(\)"):

        @attrs.frozen
        class Loose(AdapterConfig):
            def __attrs_post_init__(self) -> None:
                pass


def test_annotations_written_as_text_are_resolved() -> None:
    """A plugin may postpone the evaluation of annotations; its config is checked all the same."""

    @attrs.frozen
    class Postponed(AdapterConfig):
        value: "int | None" = setting(0, doc="Postponed.")  # noqa: RUF009 (an attrs field)

    assert from_mapping(Postponed, {"value": None}).value is None
    assert problems_of(lambda: from_mapping(Postponed, {"value": "1"})) == [
        "expected int or None, got str '1' @ $.value",
    ]


def test_every_shared_setting_says_what_it_means() -> None:
    """The documentation and the command line use these texts."""
    assert all(field.metadata["doc"] for field in attrs.fields(AdapterConfig))


@attrs.frozen
class Known(AdapterConfig):
    """Settings that other libraries have under other names."""

    rank: int = setting(8, doc="A rank.", aka=("r", "lora_r"))
    first: int = setting(8, doc="A bound.", aka=("bounds",))
    last: int = setting(8, doc="A bound.", aka=("bounds",))


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("r", "; did you mean 'rank'?"),
        ("lora_r", "; did you mean 'rank'?"),
        ("bounds", "; did you mean 'first' or 'last'?"),
        ("target_modules", "; did you mean 'targets'?"),
        ("exclude_modules", "; did you mean 'exclude'?"),
        ("modules_to_save", "; did you mean 'train_modules'?"),
        ("layers_to_transform", "; did you mean 'layers'?"),
        ("use_dora", "; use method 'dora'"),
        ("task_type", "; leave it out: the model's class determines the task"),
        ("tinit", "; it is a setting of method 'adalora'"),
        ("rnak", "; did you mean 'rank'?"),
    ],
)
def test_the_name_of_another_library_is_answered_with_ours(key: str, hint: str) -> None:
    """From a mapping and as an argument: the setting, or where there is none what to do instead."""
    given: dict[str, Any] = {key: 1}
    for build in (lambda: from_mapping(Known, given), lambda: Known(**given)):
        (problem,) = problems_of(build)
        assert problem.startswith(f"unknown key '{key}'{hint}")
        assert problem.endswith(f" @ $.{key}")


def test_a_setting_of_that_name_is_no_other_librarys() -> None:
    """What a method has, it has under its own name, whatever others call it."""

    @attrs.frozen
    class Own(AdapterConfig):
        use_dora: bool = setting(False, doc="A method that is DoRA.")
        r: int = setting(1, doc="A rank.")

    assert from_mapping(Own, {"use_dora": True, "r": 2}) == Own(use_dora=True, r=2)


def test_unknown_arguments_are_all_named_and_the_signature_stays() -> None:
    """Building a config by hand says as much as reading it; editors and ``help`` see the fields."""
    assert len(problems_of(lambda: Known(r=1, lora_alpha=2))) == 2  # type: ignore[call-arg]
    assert [*inspect.signature(Known).parameters][:3] == ["rank", "first", "last"]
    with pytest.raises(TypeError, match="positional"):
        Known(*range(1, 5))  # type: ignore[call-arg, arg-type]
