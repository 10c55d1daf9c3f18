"""Rows about the command's folders: kills at any moment, a full disk, and a folder that cannot be written."""

import ctypes
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import tunerkit
from tests.faults.harness import Fault, cases
from tests.faults.isolation import fork, in_fork, limit_file_size
from tests.faults.subjects import Subject
from tests.support.product_plugin import ProductPlugin

MINE = {"notes.txt": "mine", "checkpoints/mine.txt": "mine", "logs/mine.txt": "mine", "pictures/mine.png": "mine"}
_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS
_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod")


class Commands:
    """A trained run, and the commands that write into a folder: each with what it leaves when nothing stops it."""

    def __init__(self, folder: Path) -> None:
        from tests.support.train_command import arguments_of, succeeded

        tunerkit.register(ProductPlugin())
        self.folder = folder
        self.training = [*arguments_of(folder, "toy-product", "{rank: 2}"), "--epochs", "1", "--set", "save_steps=2"]
        self.source = folder / "source"
        succeeded(*self.training, "--out", self.source)
        self.kept = files(self.source)
        self.whole: dict[str, dict[str, bytes]] = {}
        for name in self.calls(self.source):
            place = folder / f"whole-{name}"
            self.prepare(name, place)
            self.calls(place)[name]()
            self.whole[name] = files(place)

    def calls(self, place: Path) -> dict[str, Callable[[], Any]]:
        """The calls that write ``place``, by name. Each raises if it fails."""
        from tests.support.train_command import succeeded

        source, base = str(self.source), str(self.folder / "tiny")
        return {
            "train": lambda: succeeded(*self.training, "--out", place),
            "merge": lambda: succeeded("merge", source, "--out", place),
            "train --overwrite": lambda: succeeded(*self.training, "--out", place, "--overwrite"),
            "convert": lambda: succeeded("convert", source, "--to", "toy", "--base", base, "--out", place),
            "train --resume": lambda: succeeded("train", "--out", place, "--resume"),
            "export": lambda: tunerkit.export(tunerkit.from_folder(source)[0], place, "toy"),
            "convert --overwrite": lambda: succeeded(
                *("convert", source, "--to", "toy", "--base", base, "--out", place, "--overwrite")
            ),
        }

    def prepare(self, name: str, place: Path) -> None:
        """Put into ``place`` what a call finds there: an earlier run with files of the user's, or half a run."""
        if name == "train --overwrite":
            shutil.copytree(self.source, place)
            for file, text in MINE.items():
                (place / file).parent.mkdir(exist_ok=True)
                (place / file).write_text(text)
        elif name == "train --resume":
            from tests.support.train_command import command, signalled

            with signalled(3, signal.SIGINT):
                command(*self.training, "--out", place)
        elif name == "convert --overwrite":
            shutil.copytree(self.folder / "whole-convert", place)

    def wrong(self, name: str, place: Path) -> str:
        """What is wrong with a folder after its call was stopped; an empty text if nothing is."""
        found = files(place)
        if files(self.source) != self.kept:
            return "the files of the source were changed"
        if name == "train --overwrite" and (lost := [each for each in MINE if found.get(each) != b"mine"]):
            return f"files of the user's are gone: {lost}"
        for path, data in found.items():
            if not _is_hidden(path) and not path.startswith("checkpoints/checkpoint-") and (half := _half(path, data)):
                return f"{path} is half written: {half}"
        if name == "merge" and place.exists() and found.keys() != self.whole[name].keys():
            return f"the merged folder is there, with {sorted(found)} only"
        return ""

    def again(self, name: str, place: Path) -> str:
        """Call again, as a user would, and compare the end with that of a call that nothing stopped."""
        found = files(place)
        if not (name in ("merge", "convert") and found.keys() == self.whole[name].keys()):
            wanted = name
            if name.startswith("train"):
                ready = "recipe.yaml" in found and "run.json" not in found
                wanted = "train --resume" if ready else "train --overwrite" if found else "train"
            elif name == "convert" and found:
                wanted = "convert --overwrite"
            self.calls(place)[wanted]()
        found, whole = files(place), self.whole[name]
        left = [*filter(_is_hidden, found), *(each.name for each in place.parent.glob(".writing-*"))]
        if left:
            return f"files are left behind: {left}"
        if found.keys() != whole.keys():
            return f"there are other files than without the kill: {sorted(found.keys() ^ whole.keys())}"
        same = ("adapter.safetensors", "model.safetensors", "toy.json", "tokenizer.json")
        different = [path for path in found if path.rpartition("/")[2] in same and found[path] != whole[path]]
        return f"other bytes than without the kill: {different}" if different else ""


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in Path(path).parts)


def _half(path: str, data: bytes) -> str:
    """Why a file is not whole; an empty text if it is."""
    if path.endswith(".json"):
        try:
            json.loads(data)
        except ValueError as error:
            return str(error)
    if path.endswith(".safetensors"):
        length = int.from_bytes(data[:8], "little")
        try:
            entries = json.loads(data[8 : 8 + length])
        except ValueError as error:
            return str(error)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        return "" if len(data) == 8 + length + max(ends, default=0) else "it is cut"
    if path.endswith(".html") and b"</html>" not in data:
        return "it is cut"
    return ""


# --- Kills ------------------------------------------------------------------------------------------------------------


def kills(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Kill a command: when it opens, renames, creates or removes its k-th file, or after a random time."""
    commands = Commands(folder)
    names = tuple(commands.whole)
    measured = {name: _measured(commands, name) for name in names}
    for number, _, chance in cases("kills of a command", subject, count):
        name = names[number % len(names)]
        events, seconds = measured[name]
        by_event = number // len(names) % 2 == 0
        at, after = chance.randrange(1, events + 1), chance.uniform(0, seconds)
        label = f"at file event {at} of {events}" if by_event else f"after {after:.2f} of {seconds:.2f} s"
        place = folder / f"case-{number}" / "out"
        place.parent.mkdir()
        commands.prepare(name, place)
        child = fork(lambda _, n=name, p=place, k=at if by_event else 0: _run_until(commands, n, p, k))  # type: ignore[misc]
        if not by_event:
            time.sleep(after)
            child.kill()
        child.wait()
        outcome = commands.wrong(name, place) or in_fork(lambda n=name, p=place: commands.again(n, p))  # type: ignore[misc]
        yield Fault(f"{number}: {name}, killed {label}", outcome)
        shutil.rmtree(place.parent)


def _measured(commands: Commands, name: str) -> tuple[int, float]:
    """The number of file events of a call, and its seconds."""
    place = commands.folder / f"measured-{name}" / "out"
    place.parent.mkdir()
    commands.prepare(name, place)

    def count(writing: IO[bytes]) -> None:
        events = 0

        def note(event: str, arguments: Any) -> None:
            nonlocal events
            events += _concerns(place, event, arguments)

        sys.addaudithook(note)
        begun = time.monotonic()
        commands.calls(place)[name]()
        pickle.dump(f"{events} {time.monotonic() - begun}", writing)

    child = fork(count)
    events, seconds = next(child.outcomes()).split()
    child.wait()
    return int(events), float(seconds)


def _run_until(commands: Commands, name: str, place: Path, number: int) -> None:
    """Run a call, and kill this process at the k-th file event; with 0, it runs until somebody else kills it."""
    left = number

    def note(event: str, arguments: Any) -> None:
        nonlocal left
        left -= _concerns(place, event, arguments)
        if left == 0:
            left = -1  # killing is an event too
            os.kill(os.getpid(), signal.SIGKILL)

    if number:
        sys.addaudithook(note)
    commands.calls(place)[name]()


def _concerns(place: Path, event: str, arguments: Any) -> bool:
    """Whether something happens to a file in or beside ``place``."""
    return event in _EVENTS and str(place.parent) in str(arguments[0])


# --- No room ----------------------------------------------------------------------------------------------------------


def no_room(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Run a command where a file can grow to k bytes only, or into a folder on a file system that is read-only."""
    commands = Commands(folder)
    names = tuple(commands.whole)
    (folder / "mounted").mkdir()
    can_mount = not in_fork(lambda: _make_read_only(folder / "mounted" / "out"))
    for number, _, chance in cases("commands without room", subject, count):
        name = names[number % len(names)]
        place = folder / f"case-{number}" / "out"
        place.parent.mkdir()
        commands.prepare(name, place)
        read_only = can_mount and number // len(names) % 3 == 2  # without that right, the disk is full instead
        limit = chance.randrange(max(map(len, commands.whole[name].values())))
        label = "a read-only folder" if read_only else f"full after {limit} bytes"
        before = files(place)

        def fail(n: str = name, p: Path = place, ro: bool = read_only, k: int = limit) -> str:
            return _said(commands, n, p, read_only=ro, limit=k)

        outcome = in_fork(fail) or commands.wrong(name, place)
        if not outcome and read_only and files(place) != before:
            outcome = "a file in the read-only folder was changed"
        outcome = outcome or in_fork(lambda n=name, p=place: commands.again(n, p))  # type: ignore[misc]
        yield Fault(f"{number}: {name}, {label}", outcome)
        shutil.rmtree(place.parent)


def _said(commands: Commands, name: str, place: Path, *, read_only: bool, limit: int) -> str:
    """Run a call that has no room. It may succeed with a limit that is never reached; else it says so in one line."""
    if read_only:
        _make_read_only(place)
    else:
        limit_file_size(limit)
    try:
        commands.calls(place)[name]()
    except AssertionError as error:  # of a command, with what it printed
        text = str(error)
        if "SystemExit(2)" in text and "Traceback" not in text:
            return ""
        return f"the command does not say it in one line: {text[-300:]}"
    except tunerkit.TunerkitError:
        return ""
    return "there was no error" if read_only else ""


def _make_read_only(place: Path) -> str:
    """Make the folder of ``place`` read-only, for root too: in a mount namespace of this process."""
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_MOUNTS):  # Python has os.unshare from 3.12 on
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    top = str(place.parent)
    for options in (["--make-rprivate", "/"], ["--bind", top, top], ["-o", "remount,bind,ro", top]):
        subprocess.run(["mount", *options], check=True, capture_output=True)
    return ""
