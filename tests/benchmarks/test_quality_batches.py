"""The quality benchmark's batches: every row once, little padding, a different order in every epoch."""

import math
import random

from hypothesis import given, strategies as st

from benchmarks.quality.batches import padded, shuffled_batches, sorted_batches


@given(st.lists(st.integers(1, 40), min_size=1, max_size=300), st.integers(1, 16), st.integers(0, 5))
def test_batches_hold_every_row_once(lengths: list[int], size: int, seed: int) -> None:
    """No batch order loses or repeats a row or exceeds the size, and both use the minimum number of batches."""
    for batches in (list(shuffled_batches(lengths, size, random.Random(seed))), list(sorted_batches(lengths, size))):
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        assert max(map(len, batches)) <= size
        assert len(batches) == math.ceil(len(lengths) / size)


def test_shuffled_batches_have_rows_of_similar_length_and_change_with_the_epoch() -> None:
    """Within a pool there is only the padding that sorting leaves; the next draw of the same generator differs."""
    lengths = random.Random(7).choices(range(1, 101), k=256)
    rng = random.Random(0)
    first, second = (list(shuffled_batches(lengths, 8, rng)) for _ in range(2))
    assert {*map(frozenset, first)} != {*map(frozenset, second)}
    padding = sum(max(lengths[row] for row in batch) * len(batch) for batch in first)
    assert padding < 1.2 * sum(lengths)
    assert [max(lengths[row] for row in batch) for batch in first] != sorted(max(lengths[r] for r in b) for b in first)


def test_padding_is_masked_and_nothing_else() -> None:
    """A batch is as long as its longest row; the padding has mask 0."""
    batch = padded([(8,), (5, 6, 7)], padding=9)
    assert batch["input_ids"].tolist() == [[8, 9, 9], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
