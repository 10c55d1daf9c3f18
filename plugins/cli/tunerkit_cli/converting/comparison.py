"""Compare what two adapters hold: settings, places, ranks and products. No model runs."""

from collections.abc import Mapping, Sequence

import attrs
from torch import Tensor

from tunerkit import BaseMismatchError, Factors, Tuner, biases_of, copies_of, factors_of, unstructure
from tunerkit.paths import join
from tunerkit_cli.converting.opening import Opened, open_adapter
from tunerkit_cli.converting.products import relative, relative_tensor
from tunerkit_cli.converting.remarks import collected
from tunerkit_transformers.pretrained import quiet

EQUAL = 1e-6  # a relative difference up to which two fp32 adapters are the same
# They say where an adapter is, in patterns: the targets themselves are compared.
_PLACES = ("targets", "exclude", "layers", "train_modules", "rank_pattern", "alpha_pattern")


@attrs.frozen
class Compared:
    """How two adapters differ.

    Attributes:
        one: The first one's path.
        other: The second one's path.
        methods: Their methods.
        settings: The settings that both have with different values, each with the two values.
        only: The targets that only the first and only the second one has.
        ranks: The targets with different ranks, each with the two ranks.
        products: The relative difference of what is added to each target, the worst first. A target that only one of
            them has counts 1, unless nothing is added to it.
        copies: The relative difference of each tensor that is trained in full, the worst first.
        biases: The same for trained biases.
        remarks: What the user should know of reading them.
    """

    one: str
    other: str
    methods: tuple[str, str]
    settings: Mapping[str, tuple[object, object]]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    ranks: Mapping[str, tuple[int, int]]
    products: Mapping[str, float]
    copies: Mapping[str, float]
    biases: Mapping[str, float]
    remarks: tuple[str, ...]

    @property
    def largest(self) -> float:
        """The largest relative difference of what the adapters do to the model."""
        return max([0.0, *self.products.values(), *self.copies.values(), *self.biases.values()])

    @property
    def is_equal(self) -> bool:
        """Whether they do the same to the model, however they hold it."""
        return self.largest <= EQUAL


def compare_adapters(one: str, other: str, *, base: str | None, task: str | None) -> Compared:
    """Compare two adapters of one base model. Its weights are not read.

    Raises:
        TunerkitError: One of them cannot be opened, or they are of different base models.
    """
    quiet()
    with collected() as remarks:
        first = open_adapter(one, base=base, task=task, beside=other)
        second = open_adapter(other, base=base, task=task, beside=one)
        _refuse_others(one, first, other, second)
        tuners = first.tuner, second.tuner
        factors = factors_of(tuners[0]), factors_of(tuners[1])
        ranks = tuners[0].ranks(), tuners[1].ranks()
        return Compared(
            one=one,
            other=other,
            methods=(tuners[0].method, tuners[1].method),
            settings=_settings(*tuners),
            only=(_missing(factors[0], factors[1]), _missing(factors[1], factors[0])),
            ranks={path: (rank, ranks[1][path]) for path, rank in ranks[0].items() if ranks[1].get(path, rank) != rank},
            products=_worst_first(
                {path: relative(factors[0].get(path), factors[1].get(path)) for path in {**factors[0], **factors[1]}}
            ),
            copies=_worst_first(_tensors(_flat(copies_of(tuners[0])), _flat(copies_of(tuners[1])))),
            biases=_worst_first(_tensors(biases_of(tuners[0]), biases_of(tuners[1]))),
            remarks=tuple(remarks),
        )


def _refuse_others(one: str, first: Opened, other: str, second: Opened) -> None:
    """Raise `BaseMismatchError` if the weights of the two bases have other shapes: nothing could be compared."""
    beside = _shapes(second.tuner)
    for path, shapes in _shapes(first.tuner).items():
        if beside.get(path, shapes) != shapes:
            raise BaseMismatchError(
                f"{one} and {other} are of different base models, {first.base.source} and {second.base.source}: "
                f"{path} has {shapes} and {beside[path]}. Pass two adapters of one base"
            )


def _shapes(tuner: Tuner) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of the base's parameters at each target, by path and by name."""
    own = {target.path: target.module.named_parameters(recurse=False) for target in tuner.targets}
    return {path: {name: tuple(each.shape) for name, each in parameters} for path, parameters in own.items()}


def _settings(one: Tuner, other: Tuner) -> dict[str, tuple[object, object]]:
    mine, theirs = unstructure(one.config), unstructure(other.config)
    shared = [name for name in mine if name in theirs and name not in _PLACES]
    return {name: (mine[name], theirs[name]) for name in shared if mine[name] != theirs[name]}


def _missing(one: Mapping[str, Factors], other: Mapping[str, Factors]) -> tuple[str, ...]:
    return tuple(path for path in one if path not in other)


def _flat(copies: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {join(path, name): tensor for path, own in copies.items() for name, tensor in own.items()}


def _tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    return {
        name: relative_tensor(one[name], other[name]) if name in one and name in other else 1.0
        for name in {**one, **other}
    }


def _worst_first(found: Mapping[str, float]) -> dict[str, float]:
    names: Sequence[str] = sorted(found, key=lambda name: -found[name])
    return {name: found[name] for name in names}
