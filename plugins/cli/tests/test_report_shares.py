"""Where the parameters went: sums that leave nothing out."""

from hypothesis import given, strategies as st

from plugins.cli.tests import run_records
from plugins.cli.tests.pages import Page
from tunerkit_cli.report.html.page import render
from tunerkit_cli.report.rank_map import by_matrix_and_layer, parts_of

sizes = st.dictionaries(st.tuples(st.integers(0, 5), st.sampled_from("qkvo")), st.integers(0, 99))


@given(sizes)
def test_sums_by_matrix_and_by_layer_leave_nothing_out(sizes: dict[tuple[int, str], int]) -> None:
    """Each is the sum over all targets of that kind; where all are equal, there is nothing to show."""
    paths = {f"model.layers.{layer}.{matrix}": size for (layer, matrix), size in sizes.items()}
    matrices, layers = by_matrix_and_layer(paths)
    for place, found in ((0, layers), (1, matrices)):
        expected: dict[str, int] = {}
        for key, size in sizes.items():
            expected[str(key[place])] = expected.get(str(key[place]), 0) + size
        assert dict(found) == (expected if len(set(expected.values())) > 1 else {})
    assert list(matrices.values()) == sorted(matrices.values(), reverse=True)


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 99)))
def test_parts_add_up_to_one(amounts: dict[str, int]) -> None:
    """Unless there is nothing to share."""
    total = sum(parts_of(amounts).values())
    assert abs(total - (1 if any(amounts.values()) else 0)) < 1e-9


def test_the_page_has_every_layer_of_a_deep_model() -> None:
    """However many there are: each has its row."""
    sizes = {f"model.layers.{layer}.q_proj": 1000 + layer for layer in range(300)}
    page = Page(render(run_records.minimal(sizes=sizes)))
    rows = [attrs["title"] for tag, attrs in page.tags if tag == "tr" and "title" in attrs]
    assert [row.partition(",")[0] for row in rows if row is not None] == [f"{n}: 1" for n in range(300)]
