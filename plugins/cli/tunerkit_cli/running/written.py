"""The list of the files that a run wrote into its folder: a run that replaces it removes these, and no other file."""

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Final

import tunerkit
from tunerkit.errors import TunerkitError
from tunerkit_cli.recipes.recipe import TASKS
from tunerkit_cli.settings import read_settings
from tunerkit_transformers.output_folder import RECORD
from tunerkit_transformers.run_folder import LIST, RECIPE

DIGESTS: Final = "data.sha256"
CHECKPOINTS: Final = "checkpoints"
LOGS: Final = "logs"  # TensorBoard's
PICTURES: Final = "pictures"  # of earlier versions
CARD: Final = f"{CHECKPOINTS}/README.md"  # TRL writes it with each checkpoint
_CHECKPOINT: Final = re.compile(rf"{CHECKPOINTS}/checkpoint-\d+")
# What the trainer and the processors of transformers write into a checkpoint. Only runs of earlier versions need this.
_OF_CHECKPOINTS: Final = re.compile(
    r"trainer_state\.json|training_args\.bin|optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth"
    r"|(adapter|state)\.safetensors|config\.json|generation_config\.json|\..*\.tmp"
)
_OF_PROCESSORS: Final = re.compile(
    r"tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(txt|json)|merges\.txt"
    r"|(spiece|tokenizer|sentencepiece\.bpe)\.model|(source|target)\.spm|chat_template\.(jinja|json)"
    r"|(pre|video_pre)?processor_config\.json"
)


def note(folder: Path, paths: Iterable[str], *, earlier: Collection[str] | None = None) -> None:
    """Add files to the list, by their paths in the folder; the end ``/`` is for a checkpoint that is being written.

    ``earlier`` are the files that stay of the run that this one replaces (`earlier_files`); None leaves them as they
    are.
    """
    from tunerkit import serialization  # imports torch, which checking a folder does not need

    known = {path for path in _listed(folder) or () if os.path.lexists(folder / path)}
    found = sorted({*known, *paths, LIST})
    # A checkpoint that has been written is listed file by file: its folder is left out.
    whole = {f"{parent}/" for path in found for parent in PurePosixPath(path.rstrip("/")).parents}
    found = [path for path in found if path not in whole]
    older = sorted(earlier_files(folder) if earlier is None else earlier)
    listed = {"tunerkit": tunerkit.__version__, "files": found, **({"earlier": older} if older else {})}
    serialization.replace(folder / LIST, [json.dumps(listed, indent=1, ensure_ascii=False).encode()])


def earlier_files(folder: Path) -> frozenset[str]:
    """The files of an earlier run, its adapter and record, that stay until the run which replaces it has an adapter."""
    listed = _json(folder / LIST).get("earlier")
    paths = listed if isinstance(listed, list) else []
    return frozenset(path for path in paths if isinstance(path, str)) & (run_files(folder) or frozenset())


def has_ended(folder: Path) -> bool:
    """Whether the run that was last begun in a folder has its record."""
    return (folder / RECORD).is_file() and RECORD not in earlier_files(folder)


def files_in(folder: Path, *inside: str) -> frozenset[str]:
    """The files in some folders of a folder, by their paths in it; nothing behind a link."""
    return frozenset(
        (Path(place) / name).relative_to(folder).as_posix()
        for each in inside
        if not os.path.islink(folder / each)
        for place, _, names in os.walk(folder / each)
        for name in names
    )


def run_files(folder: Path) -> frozenset[str] | None:
    """The files in a folder that are a run's, by their paths in it; None if the folder is not a run's.

    Names alone do not make a folder a run's: somebody may keep a ``run.json`` or a ``data.sha256`` of his own.
    """
    listed = _listed(folder)
    found = _of_earlier_version(folder) if listed is None else listed
    if not found:
        return None
    half = [path.rstrip("/") for path in found if path.endswith("/") and _is_plain(folder, path.rstrip("/"))]
    whole = {*found, *files_in(folder, *half)}
    return frozenset(path for path in whole if _is_plain(folder, path) and (folder / path).is_file())


def remove(folder: Path, paths: Iterable[str]) -> None:
    """Remove files of a run, and the folders of a run that are empty then.

    The record and the recipe go first: without them, what is left of a run is not taken for one that can be used or
    resumed. The list stays: it says that the folder is a run's.
    """
    for path in sorted({*paths} - {LIST}, key=lambda path: (path != RECORD, path != RECIPE)):
        (folder / path).unlink(missing_ok=True)
    checkpoints = (folder / CHECKPOINTS).glob("checkpoint-*")
    for place in (*checkpoints, *(folder / name for name in (f"{CHECKPOINTS}/start", CHECKPOINTS, LOGS, PICTURES))):
        with suppress(OSError):  # it has other files, or is a link
            place.rmdir()


def _listed(folder: Path) -> frozenset[str] | None:
    """The paths in a folder's list; None if there is none that a run wrote."""
    match _json(folder / LIST):
        case {"tunerkit": str(), "files": list(paths)}:
            return frozenset(path for path in paths if isinstance(path, str) and _is_inside(path))
    return None


def _is_inside(path: str) -> bool:
    """Whether a path leads to a file in the folder."""
    parts = PurePosixPath(path).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts and not {"\0", "\\", ":"} & {*path}


def _is_plain(folder: Path, path: str) -> bool:
    """Whether neither the path in the folder nor what is above it there is a link, behind which anything may lie."""
    place = PurePosixPath(path)
    return not any(os.path.islink(folder / each) for each in (place, *place.parents) if each != PurePosixPath("."))


def _of_earlier_version(folder: Path) -> frozenset[str]:
    """The files of a run of a version that kept no list, by their content or their known names; none if it is no run's.

    A run that has ended has its record, and one that has not has a recipe with the digests of just its data, or with a
    whole checkpoint.
    """
    recipe, record = {}, _json(folder / RECORD)
    with suppress(TunerkitError):
        recipe = read_settings(folder / RECIPE)
    has_recipe = {"version", "task", "method", "training", "out"} <= {*recipe}  # as a run writes it, with every key
    has_digests = has_recipe and _has_digests(folder, recipe)
    ended = isinstance(record.get("version"), int) and record.get("task") in TASKS and {"model", "recipe"} <= {*record}
    begun = has_digests or (has_recipe and any(_checkpoints(folder, "trainer_state.json")))
    if not (ended or begun):
        return frozenset()
    ours = {
        RECORD: ended,
        RECIPE: has_recipe,
        DIGESTS: has_digests,
        "adapter.safetensors": True,
        "environment.json": {"python", "tunerkit"} <= {*_json(folder / "environment.json")},
        "report.html": ended,
    }
    names = {name for name, is_ours in ours.items() if is_ours}
    if ended or (folder / "adapter.safetensors").is_file():  # after which it wrote its processor
        names |= {each.name for each in folder.iterdir() if _OF_PROCESSORS.fullmatch(each.name)}
    names |= {path for path in files_in(folder, LOGS) if "/events.out.tfevents." in path}
    starts = {f"{CHECKPOINTS}/{name}" for name in ("start/adapter.safetensors", "start.json", "restarts.json")}
    return frozenset({*names, *starts, *_checkpoints(folder)})


def _checkpoints(folder: Path, wanted: str = "") -> Iterator[str]:
    """The files of a trainer's checkpoints that have known names, or one name."""
    for path in files_in(folder, CHECKPOINTS):
        place, _, name = path.rpartition("/")
        known = name == wanted if wanted else _OF_CHECKPOINTS.fullmatch(name) or _OF_PROCESSORS.fullmatch(name)
        if _CHECKPOINT.fullmatch(place) and known:
            yield path


def _has_digests(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether a folder has digests of the files that a recipe names, and of no others."""
    if not (folder / DIGESTS).is_file():
        return False
    try:
        lines = (folder / DIGESTS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return False
    named = (recipe.get(key) for key in ("data", "eval_data"))
    data = [path for each in named for path in (each if isinstance(each, list) else [each])]
    pairs = [line.partition("  ") for line in lines]
    return all(re.fullmatch("[0-9a-f]{64}", digest) and path in data for digest, _, path in pairs)


def _json(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file; empty without one."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
