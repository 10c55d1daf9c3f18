"""The files of published versions: each in a folder of its own, which is named by its content and appears whole."""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

import attrs

from tunerkit import serialization
from tunerkit_serving import signs
from tunerkit_serving.adapter_folder import CONFIG, WEIGHTS, Folder, read_folder
from tunerkit_serving.findings import Engine
from tunerkit_serving.server import PublishError

_DIGITS: Final = 16  # of SHA-256 in a name


@attrs.frozen
class Versions:
    """The versions in a folder. A folder and a prefix belong to one publisher.

    Attributes:
        folder: An absolute path.
        prefix: What all names start with.
    """

    folder: Path
    prefix: str

    def add(self, write: Callable[[Path], None], rules: Engine) -> tuple[str, bool]:
        """Write a version to a temporary folder, check it, and rename the folder.

        Args:
            write: Writes a PEFT folder at a path that does not exist.
            rules: What the engine refuses.

        Returns:
            The version's name, and whether the adapter adds anything.

        Raises:
            PublishError: It cannot be written, or the engine would refuse it. No version has changed.
        """
        stage = self.folder / f".{self.prefix}-new"
        try:
            shutil.rmtree(stage, ignore_errors=True)  # a killed process left it
            stage.mkdir(parents=True)
            write(stage / "adapter")
            found = read_folder(stage / "adapter")
            _refuse(found, rules)
            name = f"{self.prefix}-{_digest(found.path)}"
            adds = _adds(found)
            if not (self.folder / name).is_dir():
                for each in (*found.path.iterdir(), found.path):
                    serialization.sync(each)
                found.path.rename(self.folder / name)
                serialization.sync(self.folder)
        except OSError as problem:
            raise PublishError(
                f"{self.folder}: a version cannot be written: {problem.strerror or problem}. The versions before are "
                "unchanged; free some space, or pass folder=, a place where you may write and the server may read"
            ) from problem
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        return name, adds

    def there(self) -> list[str]:
        """Return the names of the versions, the oldest first."""
        pattern = re.compile(rf"{re.escape(self.prefix)}-[0-9a-f]{{{_DIGITS}}}")
        found = [each for each in self.folder.glob(f"{self.prefix}-*") if pattern.fullmatch(each.name)]
        return [each.name for each in sorted(found, key=lambda each: (each.stat().st_mtime_ns, each.name))]

    def remove(self, names: Iterable[str]) -> None:
        """Remove versions: renamed first, so that none is ever there in part. What cannot be removed now stays."""
        away = self.folder / f".{self.prefix}-old"
        shutil.rmtree(away, ignore_errors=True)
        for name in names:
            with suppress(OSError):
                (self.folder / name).rename(away)
            shutil.rmtree(away, ignore_errors=True)


def _refuse(folder: Folder, rules: Engine) -> None:
    full = signs.bias(folder, None) + signs.saved_modules(folder, None)
    if full:
        raise PublishError(
            f"engines load matrices of LoRA while they run, and no biases, heads or modules trained in full; this "
            f"adapter has {', '.join(full[:3])}. Train without them, or serve the merged model: tunerkit merge"
        )
    bad = [each for each in rules.check(folder, max_rank=1 << 30) if each.severity.is_bad]  # the server knows its rank
    if bad:
        raise PublishError(
            f"{rules.name} does not serve this adapter: {bad[0].rule.rstrip('.')} ({bad[0].key}; {bad[0].source}). "
            "Write it as a LoRA of one rank: tunerkit convert PATH --to peft --set form=uniform, or for a method "
            "without factors first --to lora; else serve the merged model: tunerkit merge"
        )


def _digest(folder: Path) -> str:
    digests = []
    for name in (CONFIG, WEIGHTS):
        with (folder / name).open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").digest())
    return hashlib.sha256(b"".join(digests)).hexdigest()[:_DIGITS]


def _adds(folder: Folder) -> bool:
    """Whether some B is not zero."""
    from safetensors import safe_open

    with safe_open(folder.path / WEIGHTS, framework="pt") as file:
        return any(bool(file.get_tensor(pair.b).any()) for pair in folder.pairs.values())
