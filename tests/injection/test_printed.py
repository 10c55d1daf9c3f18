"""What objects say of themselves: few lines, with what a person wants to know."""

import re
from collections.abc import Mapping
from html.parser import HTMLParser
from importlib import import_module

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.toys import OneMethod, Toys
from tunerkit.injection import record
from tunerkit.injection.tuner import table_of
from tunerkit.plugin import BaseLayer, Method, RankChange, Summary, Target, Tuner
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_adapters import LowRank
from tunerkit_testing.toy_methods import LowRankConfig, LowRankPlugin


class Table(HTMLParser):
    """Reads a table into rows of texts, and notes every tag, style and address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.styles: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.styles += [style for name, style in attrs if name == "style" and style]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows:
            self.rows[-1][-1] += data


@pytest.fixture
def large(toys: "Toys") -> nn.Module:
    """Twelve blocks of six layers, and one layer beside them."""
    blocks = [nn.ModuleDict({name: nn.Linear(4, 4) for name in "qkvoud"}) for _ in range(12)]
    return nn.ModuleDict({"layer": nn.ModuleList(blocks), "pooler": nn.Linear(4, 4), "head": nn.Linear(4, 2)})


def test_a_tuner_says_method_rank_budget_share_and_steps(large: nn.Module) -> None:
    """At most ten lines, however many targets there are; of the settings those that are not the defaults."""
    tunerkit.wrap(large, "toy-low-rank", {"rank": 3, "targets": ["layer.*", "pooler"], "train_modules": ["head"]})
    tuner = tunerkit.tuner(large)
    tunerkit.attach(large, torch.optim.SGD(large.parameters(), lr=0.1), total_steps=7)
    trained, total = 73 * 3 * 8 + 10, 74 * 20 - 10 + 73 * 3 * 8 + 10
    assert repr(tuner).splitlines() == [
        "tuner of adapter 'default' in a ModuleDict",
        f"  toy-low-rank, rank 3, budget 219, {trained:,} of {total:,} parameters are trained "
        f"({100 * trained / total:.2f} %), step 0 of 7",
        "  73 targets: layer.0.q, layer.0.k, layer.0.v and 70 more",
        "  1 trained in full: head",
        "  settings: targets=('layer.*', 'pooler'), train_modules=('head',), rank=3",
    ]
    assert len(repr(tunerkit.tuner(tunerkit.wrap(nn.Sequential(nn.Linear(2, 2)), "toy-low-rank")))) < 400


class Unequal(OneMethod, LowRankPlugin):
    """A low-rank method whose rank at a target is the number in its name."""

    method = Method("toy-unequal", config=LowRankConfig)

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, target: Target, base: BaseLayer) -> LowRank:  # type: ignore[override]
        return LowRank(base, 1 + int(target.path))


def test_unequal_ranks_are_a_range_and_an_inactive_adapter_says_so() -> None:
    """With the budget in force, which is the sum where the method has none."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with registered(Unequal()):
        tunerkit.wrap(model, "toy-unequal")
        assert "toy-unequal, rank 1 to 2, budget 3," in repr(tunerkit.tuner(model))
        assert "not active" not in repr(tunerkit.tuner(model))
        tunerkit.activate(model, [])
        assert ", not active" in repr(tunerkit.tuner(model))


def test_the_adapters_of_a_model_have_a_line_each(toys: "Toys", monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to ten lines in all; it is still the mapping that it was. Each line counts the model: none without need."""
    model = toys.net()
    assert repr(tunerkit.adapters(model)) == "{}"
    for number in range(12):
        tunerkit.wrap(model, "toy-low-rank", {"targets": ["conv"]}, adapter=f"a{number}")
        lines = repr(tunerkit.adapters(model)).splitlines()
        assert len(lines) == min(number + 1, 10)
    assert re.fullmatch(r"'a0': toy-low-rank, rank 2, budget 2, .* parameters are trained \(.* %\), step 0", lines[0])
    assert lines[9] == "and 3 more"
    assert tunerkit.adapters(model) == {f"a{n}": tunerkit.tuner(model, f"a{n}") for n in range(12)}
    asked: list[str] = []

    def noted(tuner: Tuner) -> str:
        asked.append(tuner.name)
        return "seen"

    monkeypatch.setattr(import_module("tunerkit.injection.tuner"), "outline", noted)
    assert repr(tunerkit.adapters(model)).splitlines() == [*(f"'a{n}': seen" for n in range(9)), "and 3 more"]
    assert asked == [f"a{n}" for n in range(9)]


def test_an_adapter_that_is_gone_is_printed_too(toys: "Toys") -> None:
    """A debugger prints what is left: no text raises."""
    model = tunerkit.wrap(toys.net(), "toy-low-rank")
    tuner = tunerkit.tuner(model)
    tunerkit.unwrap(model)
    assert "AdapterError: adapter 'default' is gone" in repr(tuner)
    assert "<table>" not in tuner._repr_html_()


def test_a_plugin_that_cannot_say_its_budget_is_printed_too() -> None:
    """The error stands where the numbers would."""

    class Failing(OneMethod, LowRankPlugin):
        method = Method("toy-failing", config=LowRankConfig)

        @tunerkit.hookimpl
        def tunerkit_budget(self) -> int:
            raise ZeroDivisionError("no steps")

    with registered(Failing()):
        model = tunerkit.wrap(nn.Sequential(nn.Linear(4, 4)), "toy-failing")
        assert "toy-failing, step 0: ZeroDivisionError: no steps" in repr(tunerkit.tuner(model))


def test_records_are_one_line() -> None:
    """A target names the class at its path, not all below it; an allocation counts its ranks; a count gives shares."""
    target = Target("encoder.0", nn.Sequential(*(nn.Linear(2, 2) for _ in range(50))))
    assert repr(target) == "Target(path='encoder.0', module=Sequential)"
    change = RankChange(step=10, budget=99, ranks={f"layer.{n}": 1 for n in range(99)})
    assert repr(change) == "RankChange(step=10, budget=99, ranks=<of 99 targets>)"
    counted = Summary(trainable=30, total=200, adapters={"a": 10, "b": 20})
    assert repr(counted) == "30 of 200 parameters are trained (15.00 %): 10 by 'a', 20 by 'b'"
    many = Summary(trainable=1, total=2, adapters={f"a{n}": 1 for n in range(50)})
    assert repr(many).endswith("1 by 'a7' and 42 more")


def test_a_printed_model_names_the_adapters_of_a_layer_and_equal_layers_once(large: nn.Module) -> None:
    """Without ranks, which differ after pruning: then torch would print each layer of a large model."""
    tunerkit.wrap(large, "toy-low-rank", {"targets": ["layer.0.*"], "rank": 1}, adapter="a")
    tunerkit.wrap(large, "toy-low-rank", {"targets": ["layer.*"], "rank": 2, "train_modules": ["head"]}, adapter="b")
    lines = [line.strip() for line in repr(large).splitlines()]
    assert "(1-11): 11 x ModuleDict(" in lines
    assert lines.count("(tunerkit): 'a': toy-low-rank, 'b': toy-low-rank") == 6
    assert lines.count("(tunerkit): 'b': toy-low-rank") == 6
    assert lines.count("(tunerkit): 'b': toy-low-rank (trained in full)") == 1


def test_what_happened_in_training_is_printed_short(large: nn.Module) -> None:
    """Neither the shapes of a large model's parameters nor each rank of each allocation."""
    tunerkit.wrap(large, "toy-low-rank", {"targets": ["layer.*"]})
    tuner = tunerkit.tuner(large)
    record(tuner, tuner.ranks())
    assert len(repr(tuner.progress)) < 400


# --- The rank map for notebooks ---------------------------------------------------------------------------------------


def test_a_notebook_shows_layers_by_matrices(large: nn.Module) -> None:
    """The text, then a table: a row for each layer, a column for each matrix, and what stands in no layer."""
    tunerkit.wrap(large, "toy-low-rank", {"rank": 3, "targets": ["layer.*", "pooler"]})
    text = tunerkit.tuner(large)._repr_html_()
    before, _, after = text.partition("<table>")
    assert "toy-low-rank, rank 3" in before
    rows = Table("<table>" + after).rows
    assert rows[0] == ["", "q", "k", "v", "o", "u", "d", "pooler"]
    assert rows[1] == ["layer.0", "3", "3", "3", "3", "3", "3", ""]
    assert rows[13] == ["", "", "", "", "", "", "", "3"]
    assert len(rows) == 14


RANKS: list[Mapping[str, int]] = [
    {"h.0.q": 4, "h.1.q": 1, "h.1.experts.3.w": 0},
    {"0": 4, "1": 2},
    {"": 3},
    {"a": 1, "b.0.c": 2, "b.d": 3},
]


@pytest.mark.parametrize("ranks", RANKS)
def test_each_rank_is_in_the_table_once(ranks: Mapping[str, int]) -> None:
    """Whatever the paths look like: nested numbers, numbers alone, the model itself."""
    cells = [cell for row in Table(table_of(ranks)).rows[1:] for cell in row[1:]]
    assert sorted(filter(None, cells)) == sorted(map(str, ranks.values()))


def test_the_highest_rank_has_the_strongest_shade() -> None:
    """The shade is the share of the highest rank, and thin enough to read text on a white and on a black page."""
    shades = Table(table_of({"h.0.q": 4, "h.1.q": 1, "h.2.q": 0})).styles
    found = [re.fullmatch(r"background:rgba\((\d+),(\d+),(\d+),([\d.]+)\)", shade) for shade in shades]
    assert [float(match[4]) for match in found if match] == [0.6, 0.15, 0.0]
    for match in found:
        assert match is not None
        *colour, alpha = map(float, match.groups())
        for page, text in ((255, 0), (0, 255)):
            mixed = [alpha * part + (1 - alpha) * page for part in colour]
            assert contrast(mixed, [text] * 3) >= 4.5  # WCAG's level AA


def contrast(one: list[float], other: list[float]) -> float:
    """The contrast of two colours, as WCAG 2 defines it."""

    def luminance(colour: list[float]) -> float:
        parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_names_are_escaped_and_nothing_is_loaded_or_run(toys: "Toys") -> None:
    """Names of modules and adapters are any text. There is no script, no address, no event."""
    bad = "<script>alert(1)</script>&\"'"
    model = nn.ModuleDict({bad: nn.ModuleDict({"0": nn.ModuleDict({bad: nn.Linear(4, 4)})})})
    tunerkit.wrap(model, "toy-low-rank", adapter=bad.replace("/", ""))
    text = tunerkit.tuner(model)._repr_html_()
    table = Table(text)
    assert table.tags <= {"pre", "table", "tr", "th", "td", "wbr"}
    assert table.attributes == {"style"}
    assert table.rows == [["", bad], [f"{bad}.0", "2"]]
    assert "url(" not in text


def test_what_has_no_rank_or_too_many_cells_has_no_table() -> None:
    """A page of a million cells would freeze the browser."""
    assert table_of({"h.0.q": 0}) == table_of({}) == ""
    assert table_of({f"h.{layer}.experts.{n}.w": 1 for layer in range(101) for n in range(100)}) == ""
    assert table_of({f"h.{layer}.experts.{n}.w": 1 for layer in range(100) for n in range(100)}) != ""


def test_tuners_of_two_models_are_told_apart(toys: "Toys") -> None:
    """A tuner is compared by identity, whatever it prints."""
    tuners: list[Tuner] = [tunerkit.tuner(tunerkit.wrap(toys.net(), "toy-low-rank")) for _ in range(2)]
    assert repr(tuners[0]) == repr(tuners[1])
    assert tuners[0] != tuners[1]
