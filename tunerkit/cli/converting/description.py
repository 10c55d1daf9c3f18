"""What the files of an adapter say without its base model, for ``tunerkit show``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

import tunerkit
from tunerkit import FileError, TunerkitError, serialization
from tunerkit.cli.converting.conversion import OWN
from tunerkit.cli.converting.remarks import collected
from tunerkit.cli.converting.stand_in import stand_in
from tunerkit.integrations.adapter_files import description_at, refuse_absent


@attrs.frozen
class Shown:
    """An adapter without its base model.

    Attributes:
        source: Its path.
        format: The format's name; ``"tunerkit"`` for our own file.
        method: The method.
        base: The name or path of the base; empty if the files do not state it.
        model_class: The class that loaded the base; empty likewise.
        labels: The number of classes of its head; 0 if it is not known.
        ranks: The rank of each target; empty if it cannot be told without the base.
        copies: The modules that are trained in full, if it is known.
        steps: The optimizer steps of its training; None if it is not known.
        parameters: The number of its values; None if it is not known.
        size: The bytes of its files; 0 for a name on the hub.
        settings: The settings of the method or of the format.
    """

    source: str
    format: str
    method: str
    base: str = ""
    model_class: str = ""
    labels: int = 0
    ranks: Mapping[str, int] = attrs.field(factory=dict)
    copies: tuple[str, ...] = ()
    steps: int | None = None
    parameters: int | None = None
    size: int = 0
    settings: Mapping[str, Any] = attrs.field(factory=dict)


def describe_adapter(source: str) -> Shown:
    """Describe the adapter at a path.

    Raises:
        FileError: No adapter is there, its files are damaged, or its format cannot be described without the base.
    """
    format = serialization.format_at(source)
    if format is None:
        return _own(source)
    found = description_at(format, source)
    if found is None:
        raise FileError(
            f"{source} is an adapter in format {format.name!r}, which can only be read with its base model: tunerkit "
            f"convert {source} --to tunerkit --base DIR --out NEW, then show NEW"
        )
    return Shown(
        source=source,
        format=format.name,
        method=found.method,
        base=found.base,
        model_class=found.model_class,
        labels=found.labels,
        ranks=dict(found.ranks),
        copies=tuple(found.copies),
        size=_size(Path(source)),
        settings=dict(found.settings),
    )


def _own(source: str) -> Shown:
    refuse_absent(source)
    file, tensors, header = serialization.read(source, content="adapter")
    shapes = {name: [int(size) for size in entry["shape"]] for name, entry in header.base.items()}
    return Shown(
        source=source,
        format=OWN,
        method=header.method,
        ranks=_ranks(source, shapes, header.targets, header.copies, tensors),
        copies=tuple(header.copies),
        steps=header.steps,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        size=Path(file).stat().st_size,
        settings=header.config,
    )


def _ranks(
    source: str,
    shapes: Mapping[str, list[int]],
    targets: Sequence[str],
    copies: Sequence[str],
    tensors: Mapping[str, Tensor],
) -> dict[str, int]:
    """The ranks by target; empty for a base whose layers cannot be told by the shapes of their weights."""
    if not 0 < len(targets) <= len(tensors):  # no file of an adapter: building all that it lists could take minutes
        return {}
    try:
        with collected():
            model = stand_in(shapes, targets, copies, tensors)
            serialization.open_unloaded(model, source)
            return tunerkit.tuner(model).ranks()
    except TunerkitError:
        return {}


def _size(place: Path) -> int:
    """The bytes of a file, or of the files in a folder."""
    files = place.iterdir() if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())
