"""Commands that are killed at any moment, have a full disk, or write into a folder that is read-only."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import IO, Any

import pytest

import tunerkit
from plugins.cli.tests.product_plugin import ProductPlugin
from tests.faults.forks import Child, asked, failures, in_fork, limit_file_size
from tests.support.train_command import arguments_of, command, signalled, succeeded

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the faults are injected in forks")
COUNT = 84 if os.environ.get("TUNERKIT_LONG") == "1" else 7  # each command once
MINE = {"notes.txt": "mine", "checkpoints/mine.txt": "mine", "logs/mine.txt": "mine", "pictures/mine.png": "mine"}
_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS
_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod")


class Commands:
    """A trained run, and the commands that write into a folder: each with what it leaves when nothing stops it."""

    def __init__(self, folder: Path) -> None:
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
        source, base = str(self.source), str(self.folder / "tiny")
        convert = ("convert", source, "--to", "toy", "--base", base, "--out", place)
        return {
            "train": partial(succeeded, *self.training, "--out", place),
            "merge": partial(succeeded, "merge", source, "--out", place),
            "train --overwrite": partial(succeeded, *self.training, "--out", place, "--overwrite"),
            "convert": partial(succeeded, *convert),
            "train --resume": partial(succeeded, "train", "--out", place, "--resume"),
            "export": lambda: tunerkit.export(tunerkit.from_folder(source)[0], place, "toy"),
            "convert --overwrite": partial(succeeded, *convert, "--overwrite"),
        }

    def prepare(self, name: str, place: Path) -> None:
        """Put into ``place`` what a call finds there: an earlier run with files of the user's, or half a run."""
        if name == "train --overwrite":
            shutil.copytree(self.source, place)
            for file, text in MINE.items():
                (place / file).parent.mkdir(exist_ok=True)
                (place / file).write_text(text)
        elif name == "train --resume":
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
    try:
        if path.endswith(".json"):
            json.loads(data)
        if path.endswith(".safetensors"):
            length = int.from_bytes(data[:8], "little")
            entries = json.loads(data[8 : 8 + length])
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            return "" if len(data) == 8 + length + max(ends, default=0) else "it is cut"
    except ValueError as error:
        return str(error)
    return "it is cut" if path.endswith(".html") and b"</html>" not in data else ""


def cases(count: int, commands: Commands) -> Iterator[tuple[str, Path, int, Random]]:
    """Yield a command, its prepared place, the number of its case, and a random generator; the same in every run."""
    names = tuple(commands.whole)
    for number in range(count):
        place = commands.folder / f"case-{number}" / "out"
        place.parent.mkdir()
        commands.prepare(names[number % len(names)], place)
        yield names[number % len(names)], place, number // len(names), Random(number)
        shutil.rmtree(place.parent)


# --- Kills ------------------------------------------------------------------------------------------------------------


def kills(count: int, folder: Path) -> Iterator[tuple[str, str]]:
    """Kill a command: when it opens, renames, creates or removes its k-th file, or after a random time."""
    commands = Commands(folder)
    measured: dict[str, tuple[int, float]] = {}
    timed: list[int] = []  # the signals by which those ended that were killed after a time
    for name, place, number, chance in cases(count, commands):
        events, seconds = measured.get(name) or measured.setdefault(name, asked(partial(_measured, commands, name)))
        at, after = chance.randrange(1, events + 1), chance.uniform(0, seconds)
        if number % 2 == 0:
            label = f"at file event {at} of {events}"
            child = Child(partial(_run_until, commands, name, place, at))
        else:
            label = f"after {after:.2f} of {seconds:.2f} s"
            child = Child(partial(_run_until, commands, name, place, 0))
            time.sleep(after)
            os.kill(child.pid, signal.SIGKILL)
        died = child.wait()
        outcome = commands.wrong(name, place) or in_fork(partial(commands.again, name, place))
        if number % 2 == 0:
            outcome = outcome or ("" if died == signal.SIGKILL else f"it was not killed (signal {died})")
        else:  # a command may end before its time
            timed.append(died)
            label += "" if died == signal.SIGKILL else ", and ended before"
            if len(timed) == len(commands.whole) and signal.SIGKILL not in timed:
                outcome = outcome or "none of the commands was killed after a time"
        yield f"{name}, killed {label}", outcome


def _measured(commands: Commands, name: str) -> tuple[int, float]:
    """The number of file events of a call, and its seconds."""
    place = commands.folder / f"measured-{name}" / "out"
    place.parent.mkdir()
    commands.prepare(name, place)
    events = 0

    def note(event: str, arguments: Any) -> None:
        nonlocal events
        events += _concerns(place, event, arguments)

    sys.addaudithook(note)
    begun = time.monotonic()
    commands.calls(place)[name]()
    return events, time.monotonic() - begun


def _run_until(commands: Commands, name: str, place: Path, number: int, _: IO[bytes]) -> None:
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


def test_after_a_kill_no_file_of_the_users_is_lost_and_none_is_half_written() -> None:
    """And the same call works again, with the same end."""
    assert failures(kills, COUNT) == []


# --- No room ----------------------------------------------------------------------------------------------------------


def no_room(count: int, folder: Path) -> Iterator[tuple[str, str]]:
    """Run a command where a file can grow to k bytes only, or into a folder on a file system that is read-only."""
    commands = Commands(folder)
    (folder / "mounted").mkdir()
    can_mount = not in_fork(partial(_make_read_only, folder / "mounted" / "out"))
    for name, place, number, chance in cases(count, commands):
        read_only = can_mount and number % 3 == 2  # without that right, the disk is full instead
        limit = chance.randrange(max(map(len, commands.whole[name].values())))
        before = files(place)
        outcome = in_fork(partial(_said, commands, name, place, read_only=read_only, limit=limit))
        outcome = outcome or commands.wrong(name, place)
        if not outcome and read_only and files(place) != before:
            outcome = "a file in the read-only folder was changed"
        outcome = outcome or in_fork(partial(commands.again, name, place))
        yield f"{name}, {'a read-only folder' if read_only else f'full after {limit} bytes'}", outcome


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
        in_a_line = "SystemExit(2)" in text and "Traceback" not in text
        return "" if in_a_line else f"the command does not say it in one line: {text[-300:]}"
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


def test_a_full_disk_and_a_read_only_folder_are_said_in_one_line() -> None:
    """And the same call works afterwards."""
    assert failures(no_room, COUNT) == []
