"""The folder of a run: the names of its files, which of the files in it are the run's, and what they say of the run.

A run that replaces an earlier one removes the files that this one wrote, by its list, and no others.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Final

import attrs

import tunerkit
from tunerkit.errors import FileError
from tunerkit_cli.machine.processes import by_the_first
from tunerkit_cli.outputs import OutputError, scratch_beside, writing
from tunerkit_cli.recipes.reading import read_recipe
from tunerkit_cli.recipes.recipe import ADALORA, Recipe, as_placed, files_of, to_mapping, with_precision
from tunerkit_cli.settings import write_settings
from tunerkit_transformers.output_folder import RECORD
from tunerkit_transformers.pretrained import Pretrained
from tunerkit_transformers.run_folder import LIST, RECIPE, stated

ADAPTER: Final = "adapter.safetensors"
ENVIRONMENT: Final = "environment.json"
REPORT: Final = "report.html"
LEFT_OUT: Final = "left-out.jsonl"  # the rows that do not fit, with drop_bad_rows
DIGESTS: Final = "data.sha256"
CHECKPOINTS: Final = "checkpoints"
LOGS: Final = "logs"  # TensorBoard's
PICTURES: Final = "pictures"  # of earlier versions
CARD: Final = f"{CHECKPOINTS}/README.md"  # TRL writes it with each checkpoint
START: Final = f"{CHECKPOINTS}/start"  # a copy of the adapter that the training goes on from
START_FACTS: Final = f"{CHECKPOINTS}/start.json"
RESTARTS: Final = f"{CHECKPOINTS}/restarts.json"
# What every run writes beside its processor and its checkpoints.
WRITTEN: Final = (LIST, RECIPE, DIGESTS, RECORD, ADAPTER, ENVIRONMENT, REPORT, CARD, LEFT_OUT)


@attrs.frozen
class RunFolder:
    """The output folder of ``tunerkit train``. Its files are named by their paths in it, with slashes."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:
        return str(self.path)

    # --- the files of the run ---

    @property
    def files(self) -> frozenset[str] | None:
        """The files that are the run's; None if the folder has no list of them: their names alone prove nothing."""
        if not (listed := self._listed()):
            return None
        half = [path.rstrip("/") for path in listed if path.endswith("/") and self._is_plain(path.rstrip("/"))]
        whole = {*listed, *self.inside(*half)}
        return frozenset(path for path in whole if self._is_plain(path) and (self / path).is_file())

    @property
    def adopted(self) -> frozenset[str]:
        """The files of a run that is resumed; by their names, if a version began it that kept no list."""
        if (files := self.files) is not None:
            return files
        return frozenset(name for name in WRITTEN if (self / name).is_file()) | self.inside(CHECKPOINTS)

    @property
    def earlier(self) -> frozenset[str]:
        """The files of the run that is replaced, its adapter and record, which stay until there is a new adapter."""
        return self._listed("earlier") & (self.files or frozenset())

    @property
    def has_ended(self) -> bool:
        """Whether the run that was last begun has its record."""
        return (self / RECORD).is_file() and RECORD not in self.earlier

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a whole checkpoint: the trainer writes its state last."""
        return any((self / CHECKPOINTS).glob("checkpoint-*/trainer_state.json"))

    def inside(self, *names: str) -> frozenset[str]:
        """All files in some of its folders, but none behind a link."""
        return frozenset(
            (Path(place) / file).relative_to(self.path).as_posix()
            for name in names
            if not os.path.islink(self / name)
            for place, _, files in os.walk(self / name)
            for file in files
        )

    def _listed(self, key: str = "files") -> frozenset[str]:
        """The paths in the folder's list; none without one, or if it is damaged or another program's."""
        with suppress(OSError, ValueError, RecursionError, AttributeError):
            found = json.loads((self / LIST).read_text(encoding="utf-8")) if (self / LIST).is_file() else {}
            paths = found.get(key) if isinstance(found.get("tunerkit"), str) else None
            return frozenset(filter(_is_inside, paths if isinstance(paths, list) else ()))
        return frozenset()

    def _is_plain(self, path: str) -> bool:
        """Whether neither the path nor what is above it in the folder is a link, behind which anything may lie."""
        place = PurePosixPath(path)
        return not any(os.path.islink(self / str(each)) for each in (place, *place.parents) if str(each) != ".")

    # --- what a run changes in it ---

    @by_the_first
    def note(self, paths: Iterable[str], *, earlier: Collection[str] | None = None) -> None:
        """Add files to the list, or a checkpoint's folder with ``/``; ``earlier`` stay of the run that is replaced."""
        from tunerkit import serialization  # imports torch, which checking a folder does not need

        found = sorted({*(path for path in self._listed() if os.path.lexists(self / path)), *paths, LIST})
        # A checkpoint that has been written is listed file by file: its folder is left out.
        whole = {f"{parent}/" for path in found for parent in PurePosixPath(path.rstrip("/")).parents}
        older = sorted(self.earlier if earlier is None else earlier)
        listed = {"tunerkit": tunerkit.__version__, "files": [path for path in found if path not in whole]}
        text = json.dumps({**listed, **({"earlier": older} if older else {})}, indent=1, ensure_ascii=False)
        serialization.replace(self / LIST, [text.encode()])

    @by_the_first
    def write(self, name: str, content: str | Mapping[str, Any]) -> None:
        """Write one of the run's files, a text or JSON, in one step, once it is listed."""
        from tunerkit import serialization

        self.note([name])
        serialization.replace(self / name, [(content if isinstance(content, str) else as_json(content)).encode()])

    @by_the_first
    def remove(self, paths: Iterable[str]) -> None:
        """Remove files of a run, and the folders of a run that are empty then; the list stays."""
        # The record and the recipe first: without them, what is left of a run can be neither used nor resumed.
        for path in sorted({*paths} - {LIST}, key=lambda path: (path != RECORD, path != RECIPE)):
            (self / path).unlink(missing_ok=True)
        checkpoints = (self / CHECKPOINTS).glob("checkpoint-*")
        for place in (*checkpoints, *(self / name for name in (START, CHECKPOINTS, LOGS, PICTURES))):
            with suppress(OSError):  # it has other files, or is a link
                place.rmdir()

    @by_the_first
    def begin(self, recipe: Recipe, earlier: Collection[str] = (), *, resume: bool) -> None:
        """Write the recipe and digests of data; an earlier run's adapter and record stay until there is a new one."""
        if resume:
            self.note(self.adopted)
            return
        if earlier:
            gone = {name for name in (RECIPE, DIGESTS) if name in earlier}
            gone |= {name for name in earlier if name.startswith((f"{CHECKPOINTS}/", f"{LOGS}/"))}
            # First: a folder that is half removed is still a run's.
            self.note(earlier, earlier={*earlier} - gone - {LIST})
            self.remove(gone)
        digests = digests_of(as_placed(recipe, self.path)).items()
        self.write(DIGESTS, "".join(f"{digest}  {stated(path, self.path)}\n" for path, digest in digests))
        self.write(RECIPE, write_settings(to_mapping(recipe)))

    @by_the_first
    def save(self, loaded: Pretrained) -> None:
        """Write a trained adapter and its processor, in place of those of an earlier run."""
        earlier = self.earlier
        with scratch_beside(self.path, self.path.name) as scratch, writing(self.path):
            tunerkit.save(loaded.model, scratch)
            loaded.processor.save_pretrained(scratch)
            new = RunFolder(scratch).inside(".")
            self.note(new)
            self.remove(earlier - new)  # the record first: it is not the new adapter's
            for name in sorted(new):
                (self / name).parent.mkdir(parents=True, exist_ok=True)
                (scratch / name).replace(self / name)
        if earlier:
            self.note((), earlier=())

    # --- what it says of the run ---

    def recipe_file(self) -> Path:
        """The recipe of the run. Raises `OutputError` if there is none."""
        if not (self / RECIPE).is_file():
            raise self.no_run()
        return self / RECIPE

    def no_run(self) -> OutputError:
        """The error if there is no run to resume."""
        return OutputError(f"--out {self}: there is no run to resume in this folder; leave --resume out to begin one")

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run, with its method: without one, it is from before LoRA was the default."""
        kept = as_placed(with_precision(read_recipe(self.recipe_file())), self.path)
        return attrs.evolve(kept, method=ADALORA) if kept.method is None and kept.from_adapter is None else kept

    @property
    def settings(self) -> Mapping[str, Any]:
        """The method's settings in the checkpoints, every default written out; none if none can be read."""
        from tunerkit import serialization

        for file in (self / CHECKPOINTS).glob(f"checkpoint-*/{ADAPTER}"):
            with suppress(FileError):
                return serialization.read(file, content="adapter")[2].config
        return {}

    def after_interrupt(self) -> str:
        """What is there after Ctrl-C and how to go on, as the end of a sentence; empty without a checkpoint."""
        if self.has_ended:
            return f"; the run in {self} has ended, and its adapter is complete"
        is_earlier = ADAPTER in self.earlier
        if (self / ADAPTER).is_file() and not is_earlier:
            return f"; the adapter is written to {self}, for tunerkit.load, and not evaluated"
        still = f"; {self / ADAPTER} is still that of the earlier run" if is_earlier else ""
        if self.has_checkpoint:
            return f"{still}; go on with: tunerkit train --out {shlex.quote(str(self))} --resume"
        return still


def as_json(values: Mapping[str, Any]) -> str:
    """Indented, standard JSON. NaN is an error: see `record.finite`."""
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def digests_of(recipe: Recipe) -> dict[str, str]:
    """The SHA-256 of each file of data and of the chat template, by path; a folder of images has none."""
    found = {}
    for path in (*files_of(recipe.data), *files_of(recipe.eval_data), *files_of(recipe.chat_template)):
        if Path(path).is_file():
            with open(path, "rb") as file:
                found[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _is_inside(path: object) -> bool:
    """Whether a path of a list leads to a file in the folder."""
    parts = PurePosixPath(path).parts if isinstance(path, str) else ()
    return bool(parts) and parts[0] != "/" and ".." not in parts and not {"\0", "\\", ":"} & {*str(path)}
