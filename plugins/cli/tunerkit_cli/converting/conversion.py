"""Write an adapter in another format, or its base with the adapter in its weights."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

import tunerkit
from tunerkit import TunerkitError, hooks, serialization
from tunerkit.config import options_from
from tunerkit.errors import ConfigError, UnknownFormatError, closest, shown
from tunerkit.extras import READERS
from tunerkit.paths import few
from tunerkit.plugin import Format
from tunerkit_cli.converting.closest_lora import LORA, Closest, open_closest
from tunerkit_cli.converting.opening import collected, open_adapter
from tunerkit_cli.converting.printing import OWN
from tunerkit_cli.outputs import OutputError, new_folder
from tunerkit_cli.settings import given_value
from tunerkit_cli.tasks import task_of
from tunerkit_transformers.adapter_files import has_no_record
from tunerkit_transformers.foreign_folder import load_foreign
from tunerkit_transformers.output_folder import load_run, read_run
from tunerkit_transformers.pretrained import quiet

_WEIGHTS: Final = (".safetensors", ".bin")
# Files with such endings that are no weights of a model.
_OTHERS: Final = (
    "adapter.safetensors",
    "training_args.bin",
    *(name for each in READERS for name in each.files),
)
_SHAPES_ONLY: Final = (
    "no weights of the base were read, so the file lists its parameters and shapes alone: a base with other values in "
    "the same shapes will not be refused. To store a sample of the values, load the adapter onto its base and save it"
)


@attrs.frozen
class Converted:
    """What was written, with the method that the adapter has in tunerkit, and the base over which it was opened."""

    format: str
    out: str
    method: str
    base: str
    ranks: Mapping[str, int]
    files: tuple[str, ...]
    size: int
    remarks: tuple[str, ...]
    error: float | None = None  # what a LoRA of a lower rank leaves out, relative to the adapter (Frobenius norm)
    errors: Mapping[str, float] = attrs.field(factory=dict)  # that of each target, the largest first


def convert_adapter(
    source: str,
    *,
    to: str,
    out: Path,
    base: str | None,
    task: str | None,
    options: Sequence[str],
    rank: int | None = None,
    overwrite: bool = False,
) -> Converted:
    """Convert an adapter to a format, ``tunerkit`` or ``lora`` too; if it fails, nothing is written."""
    given: dict[str, Any] = {}  # Any: the format checks it
    for name, sign, value in (each.partition("=") for each in options):
        if not sign or not name.strip():
            raise ConfigError([f"--set: expected key=value, as in --set form=compact, got {name + sign + value!r}"])
        given[name.strip()] = given_value(value, f"--set {name.strip()}")
    _check(source, to, out, given, rank)
    _refuse_occupied(out, overwrite=overwrite)
    before = _inodes(out)
    found: Closest | None = None
    with collected() as remarks:
        if rank is None:
            tuner, opened = open_adapter(source, base=base, task=task)
        else:
            tuner, opened, found = open_closest(source, rank, base=base, task=task)
        ours = to in (OWN, LORA)
        written = tunerkit.save(tuner.model, out) if ours else tunerkit.export(tuner.model, out, to, **given)
    files = [file for file, inode in _inodes(written).items() if before.get(file) != inode]
    return Converted(
        format=to,
        out=str(written),
        method=tuner.method,
        base=opened.source,
        ranks=tuner.ranks(),
        files=tuple(sorted(file.name for file in files)),
        size=sum(file.stat().st_size for file in files),
        remarks=(*remarks, _SHAPES_ONLY) if ours else tuple(remarks),
        error=None if found is None else found.error,
        errors={} if found is None else found.errors,
    )


def _check(source: str, to: str, out: Path, options: Mapping[str, object], rank: int | None) -> None:
    """Refuse what can be seen before the adapter is read."""
    if (to == LORA) != (rank is not None) or (rank is not None and rank < 1):
        got = "none" if rank is None else rank
        raise ConfigError(
            [f"--rank: --to lora needs the largest rank of a target, from 1 on, and other formats none; got {got}"]
        )
    if to not in (LORA, OWN):
        options_from(_format(to).options, options)
    elif options:
        raise ConfigError([f"--set: tunerkit's own file has no options, got {', '.join(options)}; leave --set out"])
    if to == OWN and serialization.format_at(source) is None and serialization.file_at(source, "adapter").is_file():
        raise TunerkitError(f"{source} is in tunerkit's own format already; copy the file instead")
    if os.path.realpath(source) == os.path.realpath(out):
        raise TunerkitError(f"--out {out}: is the adapter itself; pass another folder")


def _format(name: str) -> Format:
    """The format with this name. Raises `UnknownFormatError`, whose hint does not mind the case of letters."""
    installed = hooks.gather_formats()
    if name in {*installed, *(each for reader in READERS for each in reader.formats)}:
        return serialization.find_format(name)
    names = sorted({*installed, OWN, LORA})
    raise UnknownFormatError(
        f"--to: no format named {shown(name)}{closest(name.lower(), names)}; installed: {few(names, shown=20)}"
    )


def _inodes(place: Path) -> dict[Path, int]:
    """The files at or in ``place``, each with the number that a replaced file changes."""
    if place.is_dir():
        return {file: file.stat().st_ino for file in place.iterdir() if file.is_file()}
    return {place: place.stat().st_ino} if place.is_file() else {}


def _refuse_occupied(out: Path, *, overwrite: bool) -> None:
    """Refuse an ``out`` with other files; and a model, to whose weights transformers would apply the adapter."""
    try:
        # What a writer that was killed has left is removed by the next one.
        names = sorted(name for name in os.listdir(out) if not name.startswith(serialization.SCRATCH))
    except (OSError, ValueError):  # it is no folder, or none that can be read, as writing will say
        names = []
    weights = [name for name in names if name.endswith(_WEIGHTS) and name not in _OTHERS]
    if "config.json" in names and weights:
        raise TunerkitError(
            f"--out {out}: the folder holds a model ({weights[0]}), and transformers would load the adapter together "
            "with it; pass another folder"
        )
    if overwrite:
        return
    if names:
        raise TunerkitError(
            f"--out {out}: the folder is not empty; pass a new one, or --overwrite to replace an older adapter in it"
        )
    if os.path.isfile(out):
        raise TunerkitError(f"--out {out}: there is such a file; pass a new one, or --overwrite to replace it")


def merge(source: str, out: Path, *, base: str | None, task: str | None) -> tuple[str, ...]:
    """Write the base with an adapter in its weights, and the processor, to a new folder; return what to tell."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"--out {out}: is not empty; pass a new folder")
    if has_no_record(source):
        with collected() as remarks, new_folder(out) as scratch:
            model, processor = load_foreign(source, base, task=task, in_python=False)
            tunerkit.unwrap(model, keep_merged=True)
            each: Any  # of transformers or diffusers
            for each in (model, processor):
                if each is not None:
                    each.save_pretrained(scratch)
        return tuple(remarks)
    run = read_run(source)
    if task not in (None, run.task):
        raise TunerkitError(f"--task {task}: {source} was trained for {run.task}, as its record says; leave --task out")
    with new_folder(out) as scratch:
        quiet()
        loaded = load_run(run, base)  # not on the accelerator, which may have no room for the merged weights
        # Quantising the sums again would round them, and the folder would need the library.
        dense = None if run.quantisation is None else loaded.model.dtype
        tunerkit.unwrap(loaded.model, keep_merged=True, dtype=dense)
        task_of(run.task, run.record.get("max_length")).save_merged(loaded, scratch)
    return ()
