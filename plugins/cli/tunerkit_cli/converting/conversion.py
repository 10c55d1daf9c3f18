"""Write an adapter in another format."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

import tunerkit
from tunerkit import ConfigError, Format, TunerkitError, UnknownFormatError, hooks, serialization
from tunerkit.config import options_from
from tunerkit.errors import closest, shown
from tunerkit.extras import READERS
from tunerkit.paths import few
from tunerkit_cli.converting.description import OWN
from tunerkit_cli.converting.destination import refuse_occupied
from tunerkit_cli.converting.opening import open_adapter
from tunerkit_cli.converting.remarks import collected
from tunerkit_cli.settings import given_value
from tunerkit_transformers.adapter_files import description_at
from tunerkit_transformers.pretrained import quiet

_SHAPES_ONLY = (
    "no weights of the base were read, so the file lists its parameters and shapes alone: a base with other values in "
    "the same shapes will not be refused. To store a sample of the values, load the adapter onto its base and save it"
)


@attrs.frozen
class Converted:
    """What was written.

    Attributes:
        format: The format's name.
        out: The folder or the file.
        method: The method that the adapter has in tunerkit.
        base: The base model over which it was opened.
        ranks: The rank of each target.
        padded: The rank to which the format fills up those of all targets; 0 if it keeps them.
        files: The names of the files that were written.
        size: Their size in bytes.
        remarks: What the user should know of them.
    """

    format: str
    out: str
    method: str
    base: str
    ranks: Mapping[str, int]
    padded: int
    files: tuple[str, ...]
    size: int
    remarks: tuple[str, ...]


def convert_adapter(
    source: str,
    *,
    to: str,
    out: Path,
    base: str | None,
    task: str | None,
    options: Sequence[str],
    overwrite: bool = False,
) -> Converted:
    """Convert an adapter, without reading a weight of its base.

    Args:
        source: The adapter, in any format.
        to: The new format's name; ``"tunerkit"`` is our own file.
        out: Where to write it.
        base: The folder of the base; None for what the adapter's files say.
        task: The task, if it does not follow from the files.
        options: The format's options, each as ``key=value``.
        overwrite: Whether an older adapter at ``out`` may be replaced.

    Raises:
        TunerkitError: The adapter cannot be opened or written. Nothing is written then.
    """
    quiet()
    given = dict(_option(each) for each in options)
    _check(source, to, out, given)
    refuse_occupied(out, overwrite=overwrite)
    before = _inodes(out)
    with collected() as remarks:
        opened = open_adapter(source, base=base, task=task)
        model = opened.model
        written = tunerkit.save(model, out) if to == OWN else tunerkit.export(model, out, to, **given)
    files = [file for file, inode in _inodes(written).items() if before.get(file) != inode]
    return Converted(
        format=to,
        out=str(written),
        method=opened.tuner.method,
        base=opened.base.source,
        ranks=opened.tuner.ranks(),
        padded=_padded(to, written, opened.tuner.ranks()),
        files=tuple(sorted(file.name for file in files)),
        size=sum(file.stat().st_size for file in files),
        remarks=(*remarks, _SHAPES_ONLY) if to == OWN else tuple(remarks),
    )


def _option(text: str) -> tuple[str, Any]:  # Any: the format checks it
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise ConfigError([f"--set: expected key=value, as in --set form=compact, got {text!r}"])
    return name.strip(), given_value(value, f"--set {name.strip()}")


def _check(source: str, to: str, out: Path, options: Mapping[str, object]) -> None:
    """Refuse what can be seen before the adapter is read."""
    if to == OWN:
        if options:
            raise ConfigError([f"--set: tunerkit's own file has no options, got {', '.join(options)}; leave --set out"])
        if serialization.format_at(source) is None and serialization.file_at(source, "adapter").is_file():
            raise TunerkitError(f"{source} is in tunerkit's own format already; copy the file instead")
    else:
        options_from(_format(to).options, options)
    if os.path.realpath(source) == os.path.realpath(out):
        raise TunerkitError(f"--out {out}: is the adapter itself; pass another folder")


def _format(name: str) -> Format:
    """The format with this name. Raises `UnknownFormatError`, whose hint does not mind the case of letters."""
    installed = hooks.gather_formats()
    if name in {*installed, *(each for reader in READERS for each in reader.formats)}:
        return serialization.find_format(name)
    names = sorted({*installed, OWN})
    raise UnknownFormatError(
        f"--to: no format named {shown(name)}{closest(name.lower(), names)}; installed: {few(names, shown=20)}"
    )


def _padded(to: str, written: Path, ranks: Mapping[str, int]) -> int:
    """The one rank of all targets in a file, if that of some target is lower. Only the file's header is read."""
    found = None if to == OWN else description_at(serialization.find_format(to), str(written))
    stored = set() if found is None else set(found.ranks.values())
    return max(stored) if len(stored) == 1 and min(ranks.values(), default=0) < max(stored) else 0


def _inodes(place: Path) -> dict[Path, int]:
    """The files at or in ``place``, each with the number that a replaced file changes."""
    if place.is_dir():
        return {file: file.stat().st_ino for file in place.iterdir() if file.is_file()}
    return {place: place.stat().st_ino} if place.is_file() else {}
