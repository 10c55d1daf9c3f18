"""Rows about text that somebody wrote or changed: headers, configs, settings files, pickles and names of imports."""

import copy
import json
import os
import pickle
import random
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import tunerkit
from tests.faults.harness import Fault, cases, limited
from tests.faults.isolation import Case
from tests.faults.reading import CONFIG, Original, forge, originals, write_signed
from tests.faults.subjects import Peft, Subject, Tunerkit, net, output

# Values that no writer means, of every type that JSON has.
JUNK: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", " ", "a", "0", "null", "\0", "\ud800", "é" * 1000, "x" * 100_000, "../..", "re:(a+)+$", "re:(", "re:(?R)"),
    *("[", "*", "?" * 200, "[!a", "torch", "os.system", "__class__", "float32", "float8_e4m3fn"),
    *([], {}, [[]], [{}], [None], ["x"] * 1000, [1, "a", None], {"": 0}, {"a": {"b": {"c": []}}}, {"__class__": "os"}),
)


def mutated(value: Any, chance: random.Random) -> Any:
    """Return a copy of a JSON value with one to three changes somewhere in it."""
    changed = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        place = chance.choice(list(_containers(changed)))
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        kind = chance.choice(("replace", "replace", "replace", "delete", "add", "swap", "nest"))
        if kind == "add" or not keys:
            _add_(place, chance)
        elif kind == "delete":
            del place[chance.choice(keys)]
        elif kind == "swap":
            one, other = chance.choice(keys), chance.choice(keys)
            place[one], place[other] = place[other], place[one]
        elif kind == "nest":
            place[chance.choice(keys)] = _deep(chance.choice((10, 900, 100_000)))
        else:
            place[chance.choice(keys)] = copy.deepcopy(chance.choice(JUNK))
    return changed


class Raw(str):
    """JSON text that stands for a value which `json.dumps` cannot write, such as one nested too deeply."""


def _deep(depth: int) -> Raw:
    return Raw("[" * depth + "]" * depth)


def _add_(place: Any, chance: random.Random) -> None:
    junk = copy.deepcopy(chance.choice(JUNK))
    if isinstance(place, dict):
        place[chance.choice(("", "x", "rank", "__init__", "targets", "x" * 10_000, "\ud800"))] = junk
    else:
        place.insert(chance.randrange(len(place) + 1), junk)


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from _containers(part)


def text_of(value: Any, chance: random.Random) -> str:
    """Return JSON text, sometimes damaged as text too."""
    raws: list[str] = []

    def plain(part: Any) -> Any:
        if isinstance(part, Raw):
            raws.append(part)
            return f"\x1araw{len(raws) - 1}\x1a"
        if isinstance(part, dict):
            return {key: plain(inner) for key, inner in part.items()}
        return [plain(inner) for inner in part] if isinstance(part, list) else part

    text = json.dumps(plain(value))
    for number, raw in enumerate(raws):
        text = text.replace(json.dumps(f"\x1araw{number}\x1a"), raw)
    if chance.random() < 0.2:
        text = mangled(text, chance)
    return text


def mangled(text: str, chance: random.Random) -> str:
    """Return text with a piece removed, doubled or replaced."""
    at, length = chance.randrange(len(text) + 1), chance.choice((1, 3, 20))
    junk = chance.choice(
        ("", "\0", "{", "}", "[", "]", '"', ",", ":", "\\u", "1e999", "NaN", "é", "\n", "\t", "- ", "? ", "&a ", "*a")
    )
    return text[:at] + junk + text[at + (0 if chance.random() < 0.3 else length) :]


# --- Headers ----------------------------------------------------------------------------------------------------------


def mutated_headers(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Change the header of a file (peft: its settings file) as JSON or as text, sign it, and load it."""
    saved = originals(subject, folder)
    place = folder / "header"
    place.mkdir()
    headers = {kind: header_of(subject, original) for kind, original in saved.items()}
    tensors = {kind: safetensors.torch.load_file(o.folder / subject.file) for kind, o in saved.items()}

    def attack(number: int, kind: str, chance: random.Random) -> Case:
        def call() -> str:
            text = text_of(mutated(headers[kind], chance), chance)
            if isinstance(subject, Peft):
                (place / CONFIG).write_text(text, encoding="utf-8", errors="surrogatepass")
                (place / subject.file).write_bytes(saved[kind].files[subject.file])
            else:
                write_signed(place / subject.file, text, tensors[kind])
            return _clean_load(subject, place)

        return f"{number}: {kind}", call

    yield from limited(attack(*case) for case in cases("mutated headers", subject, count))


def header_of(subject: Subject, original: Original) -> dict[str, Any]:
    """Return the settings that stand beside the tensors."""
    if isinstance(subject, Peft):
        found: dict[str, Any] = json.loads(original.files[CONFIG])
        return found
    with safetensors.safe_open(original.folder / subject.file, framework="pt") as file:
        found = json.loads(file.metadata()["tunerkit"])
    return found


def _clean_load(subject: Subject, place: Path) -> str:
    """Load a file that may be right: it must be refused cleanly, or work."""
    try:
        loaded = subject.load(place)
    except Exception as error:
        return subject.wrong_error(error)
    return "" if output(loaded).isfinite().all() else "it was loaded, and gives no finite output"


# --- Configs ----------------------------------------------------------------------------------------------------------


def mutated_configs(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Change a mapping of settings, and build a config from it."""
    del folder
    build = _structured if isinstance(subject, Tunerkit) else _peft_config

    def attack(number: int, kind: str, chance: random.Random) -> Case:
        return f"{number}: {kind}", lambda: build(subject, kind, mutated(_settings(subject, kind), chance))

    yield from limited(attack(*case) for case in cases("mutated configs", subject, count))


def _settings(subject: Subject, kind: str) -> dict[str, Any]:
    if isinstance(subject, Tunerkit):
        found = tunerkit.unstructure(tunerkit.structure(kind, subject.config(kind)))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
    import peft

    return peft.LoraConfig(r=2, target_modules=["0", "2"]).to_dict()


def _structured(subject: Subject, kind: str, settings: Any) -> str:
    try:
        config = tunerkit.structure(kind, settings)
        model = tunerkit.wrap(net(), kind, config) if _is_small(settings) else None
    except Exception as error:
        return subject.wrong_error(error)
    if tunerkit.structure(kind, tunerkit.unstructure(config)) != config:
        return "the config does not survive its own conversion"
    return "" if model is None or output(model).isfinite().all() else "the model gives no finite output"


def _is_small(settings: Any) -> bool:
    """Whether no rank would need gigabytes, which a user may ask for."""
    numbers = [value for name, value in settings.items() if "rank" in str(name) and isinstance(value, int)]
    return all(number < 10**4 for number in numbers)


def _peft_config(subject: Subject, kind: str, settings: Any) -> str:
    import peft

    try:
        config = peft.LoraConfig.from_peft_type(**settings)
        if _is_small({"rank": settings.get("r")}):
            peft.get_peft_model(net(), config)
    except Exception as error:
        return subject.wrong_error(error)
    return ""


# --- Settings files ---------------------------------------------------------------------------------------------------


def mutated_yaml(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Change a settings file, in YAML or JSON, and read a config from it."""
    assert isinstance(subject, Tunerkit)

    def attack(number: int, kind: str, chance: random.Random) -> Case:
        def call() -> str:
            ending, data = settings_file(subject, kind, chance)
            path = folder / f"settings.{ending}"
            path.write_bytes(data)
            return _read(subject, kind, path)

        return f"{number}: {kind}", call

    yield from limited(attack(*case) for case in cases("mutated YAML", subject, count))


def settings_file(subject: Subject, kind: str, chance: random.Random) -> tuple[str, bytes]:
    """Return the ending and the bytes of a settings file that is wrong in some way."""
    from tunerkit_cli.settings import write_settings

    settings = _settings(subject, kind)
    form = chance.choice(("text", "text", "text", "bomb", "bytes", "json"))
    if form == "json":
        text = text_of(mutated(settings, chance), chance)
        return "json", text.encode("utf-8", errors="surrogatepass")
    if form == "bomb":
        return chance.choice(("yaml", "yaml", "json")), chance.choice(_BOMBS).encode()
    text = write_settings(settings)
    for _ in range(chance.choice((1, 2, 4))):
        text = mangled(text, chance)
    data = text.encode()
    if form == "bytes":
        at = chance.randrange(len(data))
        data = data[:at] + chance.randbytes(chance.choice((1, 4, 100))) + data[at:]
    return "yaml", data


_LAUGHS = "\n".join(
    [
        "a0: &a0 [x, x, x, x, x, x, x, x, x]",
        *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)),
    ]
)
_BOMBS = (
    _LAUGHS + "\ntargets: *a11",
    "targets: &a [*a]",
    "&a {rank: *a}",
    "? [1, 2]\n: 3",
    "? {a: b}\n: 3",
    "? [&a x, *a]\n: 1",
    "[" * 5_000,
    "{a: " * 5_000,
    "- " * 3_000 + "x",
    "\n".join(f"k{n}: {n}" for n in range(10_000)),
    "{" + ", ".join(f'"k{n}": {n}' for n in range(40_000)) + "}",
    "{" + ", ".join('"rank": 1' for _ in range(20_000)) + "}",
    "rank: " + "9" * 5_000,
    "rank: 0x" + "f" * 5_000,
    "rank: 1:" + ":".join(["59"] * 500),
    "rank: .nan",
    "rank: -.inf",
    "rank: 2001-01-01",
    "rank: 2001-99-99",
    "rank: !!binary 'AAAA'",
    "rank: !!python/object/apply:os.getpid []",
    "rank: !!python/name:os.system",
    "rank: !!set {1, 2}",
    "rank: !!omap [a: 1]",
    "rank: !unknown 3",
    "<<: {rank: 1}",
    "<<: [1, 2]",
    "<<: *nothing",
    "%YAML 9.9\n---\nrank: 1",
    "rank: 1\n---\nrank: 2",
    "rank: 1\nrank: 2",
    "\ufeffrank: 1",
    "rank: 'unclosed",
    "\t- rank",
    "",
    "#",
    "null",
    "3",
    "[]",
    '{"rank": ' + "1" * 10_000 + "}",
    '"' + "x" * 200_000 + '"',
    "targets: ['" + "x" * 200_000 + "']",
)


def _read(subject: Subject, kind: str, path: Path) -> str:
    from tunerkit_cli.settings import read_settings

    try:
        tunerkit.structure(kind, read_settings(path))
    except Exception as error:
        return subject.wrong_error(error)
    return ""


# --- Pickles and imports ----------------------------------------------------------------------------------------------

_MODULE = "faults_canary"


class Evil:
    """An object whose unpickling creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.mkdir, (self.trace,)


def evil_files(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Put pickles where files are expected, and names of modules and functions where the file has names."""
    saved = originals(subject, folder)
    site, trace = folder / "site", folder / "trace"
    site.mkdir()
    (site / f"{_MODULE}.py").write_text(f"import os\nos.mkdir({str(trace)!r})\nclass Net: ...\ndef run(*a, **k): ...\n")
    sys.path.insert(0, str(site))
    names = [*_PICKLES, *(_IMPORTS if isinstance(subject, Tunerkit) else _PEFT_IMPORTS)]

    def attack(number: int, kind: str, chance: random.Random) -> Case:
        label = names[number // len(subject.kinds) % len(names)]

        def call() -> str:
            place = folder / f"evil-{number}"
            place.mkdir()
            _write_evil(subject, saved[kind], label, place, trace)
            return _without_trace(subject, place, trace)

        return f"{number}: {kind}, {label}", call

    yield from limited(attack(*case) for case in cases("evil pickles and import names", subject, count))


_PICKLES = ("a pickle", "a pickle in torch's form", "a pickle in a zip", "an old pickle of torch", "a .bin beside it")
_NAMES = (
    *(_MODULE, f"{_MODULE}.run", f"{_MODULE}:run", f"{_MODULE}.Net", "os.system", "builtins.exec"),
    *("__import__('faults_canary')", "tunerkit_cli", "../site/faults_canary", "!!python/name:faults_canary.run"),
)
_FIELDS = ("method", "config.targets", "config.adapter_dtype", "config.import", "targets", "copies", "versions", "kind")
_IMPORTS = tuple(f"{field} = {name}" for name in _NAMES for field in _FIELDS)
_PEFT_FIELDS = ("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "corda_config", "runtime_config")
_PEFT_IMPORTS = tuple(f"{field} = {name}" for name in _NAMES[:6] for field in _PEFT_FIELDS)


def _write_evil(subject: Subject, original: Original, label: str, place: Path, trace: Path) -> None:
    payload = pickle.dumps({"0.weight": Evil(trace)})
    if label in _PICKLES:
        for name, data in original.files.items():
            (place / name).write_bytes(data)
        path = place / subject.file
        if label == "a pickle":
            path.write_bytes(payload)
        elif label == "a pickle in torch's form":
            torch.save({"0.weight": Evil(trace)}, path)
        elif label == "an old pickle of torch":
            torch.save({"0.weight": Evil(trace)}, path, _use_new_zipfile_serialization=False)
        elif label == "a pickle in a zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", payload)
                archive.writestr("archive/version", "3\n")
        else:
            path.rename(path.with_name("moved"))
            for ending in ("bin", "pt", "pkl"):
                torch.save({"0.weight": Evil(trace)}, path.with_suffix(f".{ending}"))
        return
    field, _, name = label.partition(" = ")

    def change(fields: dict[str, Any], tensors: Any) -> None:
        value: Any = {"parent_library": name, "base_model_class": "Net"} if field == "auto_mapping" else name
        if field.startswith("config."):
            fields["config"][field.removeprefix("config.")] = [value] if field.endswith("targets") else value
        else:
            fields[field] = (
                [value] if field in ("targets", "copies") else {value: "1"} if field == "versions" else value
            )

    forge(subject, original, place, change)


def _without_trace(subject: Subject, place: Path, trace: Path) -> str:
    """Load a file whose names may be harmless; what it names must not run and must not be imported."""
    outcome = ""
    try:
        subject.load(place)
    except Exception as error:
        outcome = subject.wrong_error(error)
    if trace.exists():
        trace.rmdir()
        return "code of the file ran"
    return "the file imported a module" if sys.modules.pop(_MODULE, None) is not None else outcome
