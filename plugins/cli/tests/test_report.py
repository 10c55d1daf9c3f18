"""Rank maps: layout, table and plot."""

import io
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from rich.console import Console

from plugins.cli.tests import run_records
from tunerkit_cli.report.rank_map import RankMap, rank_map, rank_table, shortened

MATRICES = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
ranks_of_layers = st.dictionaries(
    st.tuples(st.integers(0, 12), st.sampled_from(MATRICES)), st.integers(0, 12), min_size=1
)


def by_path(ranks: dict[tuple[int, str], int]) -> dict[str, int]:
    return {f"bert.encoder.layer.{layer}.{matrix}": rank for (layer, matrix), rank in ranks.items()}


@given(ranks_of_layers)
def test_every_rank_stands_in_the_cell_of_its_layer_and_matrix(ranks: dict[tuple[int, str], int]) -> None:
    """Reading the map cell by cell gives exactly the ranks."""
    found = rank_map(by_path(ranks))
    short = dict(zip(shortened(dict.fromkeys(m for _, m in ranks)), dict.fromkeys(m for _, m in ranks), strict=True))
    back = {
        (int(layer), short[matrix]): cell
        for layer, row in zip(found.layers, found.cells, strict=True)
        for matrix, cell in zip(found.matrices, row, strict=True)
        if cell is not None
    }
    assert back == ranks
    assert found.total == sum(ranks.values())


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join), unique=True))
def test_shortened_names_are_ends_that_tell_names_apart(names: list[str]) -> None:
    """A short name is the end of a name at a dot; all are distinct, and one component less would be ambiguous."""
    short = list(shortened(names))
    assert len(set(short)) == len(names)
    for name, end in zip(names, short, strict=True):
        assert f".{name}".endswith(f".{end}")
        less = end.partition(".")[2]
        assert not less or end == name or any(f".{other}".endswith(f".{less}") for other in names if other != name)


def test_layers_of_two_stacks_and_targets_without_a_number_have_separate_rows() -> None:
    """Encoder and decoder layers of the same number are kept apart, and an embedding is included."""
    found = rank_map({"embed": 1, "encoder.block.0.q": 2, "decoder.block.0.q": 3})
    assert found.layers == ("-", "encoder.block.0", "decoder.block.0")
    assert found.cells == ((1, None), (None, 2), (None, 3))


def test_one_stack_is_named_by_numbers_alone() -> None:
    """If only one stack has numbers, its name would be redundant."""
    assert rank_map({"a.layer.0.q": 1, "a.layer.1.q": 1, "embed": 2}).layers == ("0", "1", "-")


@given(ranks_of_layers)
def test_the_terminal_table_shows_every_rank_and_the_sums(ranks: dict[tuple[int, str], int]) -> None:
    """The printed table has each layer's ranks in order with their sum, and the total below."""
    map_ = rank_map(by_path(ranks))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(rank_table(map_, initial=12))
    lines = console.export_text().splitlines()
    numbers = [[int(part) for part in line.split("│") if part.strip().isdigit()] for line in lines]
    for layer, row in zip(map_.layers, map_.cells, strict=True):
        cells = [cell for cell in row if cell is not None]
        assert [int(layer), *cells, sum(cells)] in numbers
    assert numbers[-2][-1] == map_.total


@settings(max_examples=25)  # drawing is slow
@given(ranks_of_layers)
def test_the_heatmap_has_the_ranks_as_colours_and_as_numbers(ranks: dict[tuple[int, str], int]) -> None:
    """Each cell's colour and its number are the rank; cells without a target stay blank."""
    pictures = pytest.importorskip("tunerkit_cli.report.pictures", reason="pictures need the extra [plot]")
    map_ = rank_map(by_path(ranks))
    axes = pictures.draw_ranks(map_, title="ranks", initial=12).axes[0]
    image = axes.images[0]
    values = image.get_array().filled(-1)
    expected = [[-1 if cell is None else cell for cell in row] for row in map_.cells]
    assert [[int(v) if v == v else -1 for v in row] for row in values] == expected
    assert image.get_clim() == (0, 12)
    written = {(int(t.get_position()[0]), int(t.get_position()[1])): t.get_text() for t in axes.texts}
    assert written == {
        (x, y): str(cell) for y, row in enumerate(map_.cells) for x, cell in enumerate(row) if cell is not None
    }
    assert [label.get_text() for label in axes.get_xticklabels()] == list(map_.matrices)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(map_.layers)


def test_the_curves_hold_the_budget_and_the_mean_least_and_greatest_rank() -> None:
    """Curves show the history; a value stays until the next change."""
    pictures = pytest.importorskip("tunerkit_cli.report.pictures", reason="pictures need the extra [plot]")
    history = [
        {"step": 0, "budget": 8, "ranks": [4, 4]},
        {"step": 10, "budget": 6, "ranks": [5, 1]},
        {"step": 20, "budget": 6, "ranks": [6, 0]},
    ]
    figures = pictures.draw(run_records.minimal(ranks={"a": 6, "b": 0}, history=history))
    (budget,) = figures["budget"].axes[0].lines
    assert list(budget.get_xdata()) == [0, 10, 20]
    assert list(budget.get_ydata()) == [8, 6, 6]
    assert budget.get_drawstyle() == "steps-post"
    axes = figures["rank"].axes[0]
    assert {line.get_label(): list(line.get_ydata()) for line in axes.lines} == {
        **{"greatest": [4, 5, 6], "mean": [4, 3, 3]},
        "least": [4, 1, 0],
    }
    assert "rank" in axes.get_ylabel()
    assert axes.get_ylim()[0] < 0  # a line at 0 would coincide with the frame


def test_pictures_are_written_and_their_labels_do_not_overlap(tmp_path: Path) -> None:
    """With many layers and long names, tick labels don't overlap, and the file is a PNG."""
    pictures = pytest.importorskip("tunerkit_cli.report.pictures", reason="pictures need the extra [plot]")
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "a_projection_with_a_long_name")
    map_ = RankMap(
        layers=tuple(str(n) for n in range(40)),
        matrices=names,
        cells=tuple(tuple((n + k) % 13 for k in range(len(names))) for n in range(40)),
    )
    figure = pictures.draw_ranks(map_, title="ranks")
    figure.savefig(tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
