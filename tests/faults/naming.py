"""Rows about names and places: names of adapters, paths that lead elsewhere, and links."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import tunerkit
from tests.faults.harness import Fault, cases, refused, same_state, state_of
from tests.faults.isolation import in_fork
from tests.faults.subjects import Subject, Tunerkit, fill_, net, output

_WORDS = (
    *("default", "forward", "type", "keys", "weight", "bias", "adapter", "copy", "tunerkit", "state", "lora_A", "E"),
    *("0", "2", "4", "layers", "model", "lin", "base_model", "base_layer", "self", "None", "True", "class", "import"),
    *("__class__", "__dict__", "__init__", "_modules", "_parameters", "training", "parameters", "state_dict", "to"),
    *("con", "nul", "aux", "com1", "CON", "-", "--help", "~", "$HOME", "`id`", ";", "&", "|", "*", "?", "[a]", "{a}"),
    *(" ", "  ", " a", "a ", "\t", "\n", "\r\n", "a\nb", "\0", "a\0b", "\x1b[31m", "\x7f", "'", '"', "\\", "a\\b"),
    *(
        "é",
        "e\u0301",
        "ß",
        "ẞ",
        "İ",
        "ı",
        "K",
        "ﬁ",
        "名前",
        "🙂",
        "👩\u200d👧",
        "\u202eabc",
        "\u200b",
        "\ufeff",
        "\ud800",
    ),
    *("a" * 64, "é" * 64, "🙂" * 64, "A", "a", "%2e%2e", "%00", "a:b", "a;b", "a,b", "a=b", "#", "<a>", "re:.*", "@"),
)
_REFUSED = (
    *("", ".", "..", "a.b", ".a", "a.", "/", "a/b", "/etc", "../up", "../../up", "a/../b", "./a", "a" * 65),
    *("x" * 10_000, "..\\up", "\u2024\u2024/up", "é" * 65),
)  # fmt: skip
_NOT_TEXT: tuple[Any, ...] = (None, 0, 1.5, True, b"a", [], ["a"], ("a",), {}, object)


def names(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Give adapters odd names: each must work, from wrapping to loading, or be refused."""
    for number, kind, chance in cases("names, traversal, links", subject, count):
        place = folder / "inside" / f"case-{number}"
        place.mkdir(parents=True)
        if number % 5 == 0:
            label, call = _LINKS[number // 5 % len(_LINKS)]
            outcome = in_fork(lambda c=call, p=place, k=kind: c(subject, k, p))  # type: ignore[misc]
        else:
            name = _name(number, chance)
            label = ascii(name)[:60]
            outcome = in_fork(lambda n=name, p=place, k=kind: _named(subject, k, n, p))  # type: ignore[misc]
        strays = [path.name for path in folder.iterdir() if path.name != "inside"]
        if strays and not outcome:
            outcome = f"files were written outside the folder: {strays}"
        yield Fault(f"{number}: {kind}, {label}", outcome)


def _name(number: int, chance: random.Random) -> Any:
    """Return a name from one of the lists, or a random one."""
    listed = (*_WORDS, *_REFUSED, *_NOT_TEXT)
    index = number - number // 5
    if index < len(listed):
        return listed[index]
    alphabet = chance.choice(("ab.-_", "éß名🙂\u200d", "\0\n\t \x7f", "aA1/\\:", "".join(map(chr, range(32, 127)))))
    return "".join(chance.choices(alphabet, k=chance.choice((1, 2, 8, 63, 64, 65))))


def _named(subject: Subject, kind: str, name: Any, place: Path) -> str:
    allowed = isinstance(name, str) and name != "" and "." not in name and "/" not in name and len(name) <= 64
    call = _wrapped if isinstance(subject, Tunerkit) else _wrapped_by_peft
    base = net()
    if not allowed and subject.strict:
        return refused(subject, lambda: call(subject, kind, name, base, place), base)
    try:
        return call(subject, kind, name, base, place)
    except Exception as error:
        wrong = subject.wrong_error(error)
        return (wrong or f"an allowed name is refused: {error}"[:300]) if allowed else wrong


def _wrapped(subject: Any, kind: str, name: Any, base: Any, place: Path) -> str:
    """Wrap, save, load, merge and unwrap with an adapter of this name."""
    before = state_of(base)
    method = (
        kind if kind != "adalora" else "toy-low-rank"
    )  # what a name does to the training of ranks has its own tests
    model = tunerkit.wrap(base, method, subject.config(method), adapter=name, seed=0)
    fill_(model, ".tunerkit.", 1)
    expected = output(model)
    tunerkit.save(model, place, adapter=name)
    loaded = tunerkit.load(net(), place, adapter=name)
    if not torch.equal(output(loaded), expected):
        return "the loaded adapter gives other outputs"
    if list(tunerkit.adapters(loaded)) != [name]:
        return f"the loaded adapter is called {list(tunerkit.adapters(loaded))}"
    tunerkit.unmerge(tunerkit.merge(loaded))
    if not torch.equal(output(loaded), expected):
        return "after merging and unmerging it gives other outputs"
    return "" if same_state(state_of(tunerkit.unwrap(model)), before) else "unwrapping does not restore the base"


def _wrapped_by_peft(subject: Any, kind: str, name: Any, base: Any, place: Path) -> str:
    import peft

    before = state_of(base)
    config = peft.LoraConfig(r=2, target_modules=["0", "2"])
    model: Any = fill_(peft.get_peft_model(base, config, adapter_name=name), "lora_", 1)
    expected = output(model)
    model.save_pretrained(str(place))
    inside = place if name == "default" else place / name
    loaded: Any = peft.PeftModel.from_pretrained(net(), str(inside), adapter_name=name)
    if not torch.equal(output(loaded), expected):
        return "the loaded adapter gives other outputs"
    return "" if same_state(state_of(model.unload()), before) else "unloading does not restore the base"


# --- Links and odd paths ----------------------------------------------------------------------------------------------


def _save_and_load(subject: Subject, kind: str, path: Path) -> str:
    """Save to a path: it is refused, or the adapter can be loaded from there."""
    model = subject.trained(kind, seed=1)
    try:
        subject.save(model, path)
    except Exception as error:
        return subject.wrong_error(error)
    return "" if torch.equal(output(subject.load(path)), output(model)) else "the loaded adapter gives other outputs"


def _through_link(subject: Subject, kind: str, place: Path) -> str:
    """The file is a link to another adapter elsewhere: saving is whole, and the other file is whole too."""
    elsewhere, here = place / "elsewhere", place / "here"
    other = subject.trained(kind, seed=2)
    subject.save(other, elsewhere)
    here.mkdir()
    for path in elsewhere.iterdir():
        (here / path.name).symlink_to(path)
    outcome = _save_and_load(subject, kind, here)
    if outcome:
        return outcome
    found, wanted = output(subject.load(elsewhere)), (output(other), output(subject.trained(kind, seed=1)))
    return "" if any(torch.equal(found, each) for each in wanted) else "the file behind the link is a mixture"


def _linked_folder(subject: Subject, kind: str, place: Path) -> str:
    (place / "real").mkdir()
    (place / "link").symlink_to(place / "real", target_is_directory=True)
    return _save_and_load(subject, kind, place / "link")


def _dangling(subject: Subject, kind: str, place: Path) -> str:
    (place / subject.file).symlink_to(place / "nothing" / "there")
    return _save_and_load(subject, kind, place)


def _loop(subject: Subject, kind: str, place: Path) -> str:
    (place / subject.file).symlink_to(place / subject.file)
    outcome = refused(subject, lambda: subject.load(place))
    return outcome or _save_and_load(subject, kind, place)


def _loop_of_folders(subject: Subject, kind: str, place: Path) -> str:
    (place / "loop").symlink_to(place / "loop")
    outcome = refused(subject, lambda: subject.load(place / "loop"))
    return outcome or refused(subject, lambda: subject.save(subject.trained(kind), place / "loop"))


def _odd(name: str) -> Callable[[Subject, str, Path], str]:
    def call(subject: Subject, kind: str, place: Path) -> str:
        outcome = refused(subject, lambda: subject.load(place / name))
        return outcome or _save_and_load(subject, kind, place / name)

    return call


def _never(name: str) -> Callable[[Subject, str, Path], str]:
    """A path that no file system takes: reading and writing are refused."""

    def call(subject: Subject, kind: str, place: Path) -> str:
        model = subject.trained(kind)
        return refused(subject, lambda: subject.load(place / name)) or refused(
            subject, lambda: subject.save(model, place / name)
        )

    return call


def _device(subject: Subject, kind: str, place: Path) -> str:
    return refused(subject, lambda: subject.load(Path("/dev/null"))) or refused(
        subject, lambda: subject.save(subject.trained(kind), Path("/dev/null"))
    )


def _not_a_folder(subject: Subject, kind: str, place: Path) -> str:
    (place / "file").write_text("mine")
    outcome = refused(subject, lambda: subject.save(subject.trained(kind), place / "file"))
    return outcome or ("" if (place / "file").read_text() == "mine" else "the file was replaced")


def _folder_in_the_way(subject: Subject, kind: str, place: Path) -> str:
    (place / subject.file).mkdir()
    return refused(subject, lambda: subject.load(place)) or refused(
        subject, lambda: subject.save(subject.trained(kind), place)
    )


def _pipe(subject: Subject, kind: str, place: Path) -> str:
    """A named pipe must not make a reader wait forever; a writer replaces it."""
    os.mkfifo(place / subject.file)
    return refused(subject, lambda: subject.load(place)) if subject.strict else ""


_LINKS: tuple[tuple[str, Callable[[Subject, str, Path], str]], ...] = (
    ("a link to another adapter's file", _through_link),
    ("a link to a folder", _linked_folder),
    ("a link to nothing", _dangling),
    ("a file that links to itself", _loop),
    ("a folder that links to itself", _loop_of_folders),
    ("a path with a NUL", _never("a\0b")),
    ("a path of 300 characters", _never("x" * 300)),
    ("a path of 10,000 characters", _never("x/" * 5_000)),
    ("a path with a line break", _odd("a\nb")),
    ("a path with a lone surrogate", _odd("a\udc80b")),
    ("a path with blanks and quotes", _odd(" a 'b\" ")),
    ("a path with ..", _odd("a/../b")),
    ("a device", _device),
    ("a file where a folder is expected", _not_a_folder),
    ("a folder where the file is expected", _folder_in_the_way),
    ("a named pipe", _pipe),
)
