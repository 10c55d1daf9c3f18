"""A tensor in PEFT's shape becomes one of ours, and PEFT's again, by the sizes that a method declares."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tunerkit_peft.declarations import Leaf, Size
from tunerkit_peft.shapes import features_of, misfit, ours, shape_of, theirs

LINEAR, CONVOLUTION = nn.Linear(6, 4), nn.Conv2d(3, 4, (2, 5))
# The layer, the leaf, PEFT's shape, and ours.
CASES: dict[str, tuple[nn.Module, Leaf, Sequence[int], Sequence[int]]] = {
    "the same": (LINEAR, Leaf(name="x"), (7, 1, 3), (7, 1, 3)),
    "a dimension of one": (LINEAR, Leaf(name="x", shape=["out", 1]), (4, 1), (4,)),
    "a scalar": (LINEAR, Leaf(name="x", shape=[1]), (1,), ()),
    "a kernel": (CONVOLUTION, Leaf(name="x", shape=["rank", "*in"]), (2, 3, 2, 5), (2, 30)),
    "no kernel": (LINEAR, Leaf(name="x", shape=["rank", "*in"]), (2, 6), (2, 6)),
    "ones for a kernel": (CONVOLUTION, Leaf(name="x", shape=["out", "rank", "1*"]), (4, 2, 1, 1), (4, 2)),
    "a convolution's": (CONVOLUTION, Leaf(name="x", shape=["out"], convolution=[1, "out", "1*"]), (1, 4, 1, 1), (4,)),
}


def filled(shape: Sequence[int]) -> Tensor:
    """Values that are all different."""
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


@pytest.mark.parametrize("case", CASES)
def test_it_goes_both_ways(case: str) -> None:
    """The values stay in their order, and come back."""
    module, leaf, shape, expected = CASES[case]
    features = features_of(module)
    sizes = shape_of(leaf, features, ())
    given = filled(shape)
    assert sizes is None or misfit(shape, sizes, features, {}) == ("", False)
    found = ours(given, leaf, sizes, features)
    assert found.shape == torch.Size(expected)
    assert torch.equal(found.flatten(), given.flatten())
    assert torch.equal(theirs(found, leaf, sizes, features), given)


def test_a_setting_chooses_the_shape() -> None:
    """As IA³'s factors of inputs and of outputs do."""
    leaf, features = Leaf(name="x", shape=["out", 1], chosen={"inputs": [1, "in"]}), features_of(LINEAR)
    assert shape_of(leaf, features, ["inputs"]) == (1, "in")
    assert shape_of(leaf, features, ["others"]) == ("out", 1)


def test_integers_keep_their_kind() -> None:
    """They are int64 here, and what PEFT has there."""
    leaf, features = Leaf(name="x", shape=[2, "n"], integers="int32"), features_of(LINEAR)
    found = ours(torch.ones(2, 3, dtype=torch.int32), leaf, leaf.shape, features)
    assert (found.dtype, found.shape) == (torch.int64, (2, 3))
    assert theirs(found, leaf, leaf.shape, features).dtype == torch.int32


@pytest.mark.parametrize(
    ("shape", "sizes", "told", "is_base"),
    [
        ((4,), ["out", 1], "is [4]; expected [out 4, 1]", False),
        ((5, 1), ["out", 1], "is [5, 1]; expected [out 4, 1]", True),
        ((4, 2), ["out", 1], "is [4, 2]; expected [out 4, 1]", False),
        ((4, 2), ["out", "rank"], "is [4, 2]; expected [out 4, rank 3]", False),
        ((3, 7), ["rank", "in"], "is [3, 7]; expected [rank 3, in 6]", True),
        ((4, 3), ["out", "rank"], "", False),
    ],
)
def test_what_does_not_fit_is_told(shape: Sequence[int], sizes: Sequence[Size], told: str, is_base: bool) -> None:
    """With the sizes of the layer and of the target; only the layer's are another base model's."""
    assert misfit(shape, sizes, features_of(LINEAR), {"rank": 3}) == (told, is_base)


def test_too_many_or_too_few_dimensions_are_told() -> None:
    """They are the plugin's mistake."""
    features = features_of(LINEAR)
    for tensor, words in ((torch.ones(4), "fewer dimensions"), (torch.ones(4, 2, 3), "1 dimensions more")):
        with pytest.raises(ValueError, match=words):
            theirs(tensor, Leaf(name="x"), ["out", "rank"], features)
