"""Rank maps: their layout."""

from hypothesis import given, strategies as st

from tunerkit_cli.report.rank_map import rank_map, shortened

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
