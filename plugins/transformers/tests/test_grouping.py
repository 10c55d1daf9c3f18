"""Batches by length: every row once, in an order that the seed and the epoch decide, with little padding."""

import random
from itertools import pairwise

import datasets
from hypothesis import given, strategies as st

from tunerkit_transformers.grouping import GroupedByLength, lengths_in, padding

lengths_and_sizes = st.tuples(st.lists(st.integers(1, 99), max_size=300), st.integers(1, 9), st.integers(0, 2**32))


@given(lengths_and_sizes)
def test_an_epoch_has_every_row_once_and_the_longest_whole_batch_first(given: tuple[list[int], int, int]) -> None:
    """So memory runs out at once or never. The same seed and epoch give the same order."""
    lengths, size, seed = given
    sampler = GroupedByLength(lengths, size, seed)
    order = [*sampler]
    assert sorted(order) == [*range(len(lengths))]
    assert len(sampler) == len(lengths)
    whole = [lengths[row] for row in order[: len(lengths) // size * size]]
    assert max(whole[:size], default=0) == max(whole, default=0)
    again = GroupedByLength(lengths, size, seed)
    assert [*again] == order


def test_batches_are_of_like_lengths_and_shuffled() -> None:
    """Less than 3 % of what is computed is padding, of 40 % at random; the next epoch has other batches."""
    draw = random.Random(0)
    lengths = [round(draw.lognormvariate(3, 0.5)) + 1 for _ in range(400)]
    sampler = GroupedByLength(lengths, 8, 0)
    order = [*sampler]
    assert padding(lengths, order, 8) < 1.05 < 1.4 < padding(lengths, range(400), 8)
    firsts = [lengths[order[place]] for place in range(8, 400, 8)]
    rises = sum(one < other for one, other in pairwise(firsts))
    assert 15 < rises < 34
    sampler.set_epoch(1)
    assert [*sampler] != order


def test_the_lengths_of_rows_are_found_where_they_are_known() -> None:
    """Of texts, pairs of answers, and lists; not of packed rows, of streams, and of rows without tokens."""
    ids = [[1, 2], [3]]
    assert lengths_in(datasets.Dataset.from_dict({"input_ids": ids})) == [2, 1]
    assert lengths_in([{"input_ids": each} for each in ids]) == [2, 1]
    pairs = {"prompt_ids": ids, "chosen_ids": [[1], [1]], "rejected_ids": [[1, 2], []]}
    assert lengths_in(datasets.Dataset.from_dict(pairs)) == [4, 2]
    packed = datasets.Dataset.from_dict({"input_ids": ids, "seq_lengths": [[2], [1]]})
    assert lengths_in(packed) is lengths_in(packed.to_iterable_dataset()) is lengths_in(None) is None
    assert lengths_in([{"pixel_values": 1}]) is lengths_in(datasets.Dataset.from_dict({"text": ["a"]})) is None
