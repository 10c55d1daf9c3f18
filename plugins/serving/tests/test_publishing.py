"""Publishing to a running engine: versions by content, of one rank, of which a few stay loaded; and every refusal."""

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from plugins.serving.tests.serving_folders import Decoder, random_folder
from plugins.serving.tests.stub_vllm import BASE, StubVllm, perturb_, running
from tunerkit.plugin import Engine, resize_
from tunerkit_serving import Publisher, PublishError, Sampling, VllmServer, publisher, read_folder

pytest.importorskip("tunerkit_peft", reason="the format comes with it")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = tunerkit.wrap(Decoder(), "lora", {"rank": 4, "targets": ["q_proj", "v_proj"]})
    perturb_(model)
    return model


def to(stub: StubVllm, **settings: Any) -> VllmServer:
    """The stub, without waits between tries."""
    return VllmServer(url=stub.url, **{"waits": (0.0, 0.0), **settings})


def publishing(source: Any, stub: StubVllm, folder: Path, **settings: Any) -> Publisher:
    return publisher(source, to(stub), folder=folder, **settings)


def versions(folder: Path) -> list[str]:
    """Everything in the folder, also what is hidden."""
    return sorted(each.name for each in folder.iterdir())


def is_trained_and_published(publish: Publisher, model: nn.Module) -> str:
    perturb_(model)
    return publish.publish()


# --- Versions ---------------------------------------------------------------------------------------------------------


def test_a_version_is_loaded_under_the_hash_of_its_files(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """The server has it, from an absolute path; it has one rank and is compared with the base once."""
    publish = publishing(model, stub, tmp_path)
    name = publish.publish()
    digests = [hashlib.sha256(file.read_bytes()).digest() for file in sorted((tmp_path / name).glob("adapter_*"))]
    assert name == f"tunerkit-{hashlib.sha256(b''.join(digests)).hexdigest()[:16]}"
    assert stub.paths == {name: str(tmp_path / name)}
    assert read_folder(tmp_path / name).ranks == {8}
    assert publish.loaded == (name,)
    (tmp_path / "made-here").mkdir()  # the server may run as another user
    assert (tmp_path / name).stat().st_mode == (tmp_path / "made-here").stat().st_mode
    (tmp_path / "made-here").rmdir()
    assert (stub.count(f'"model": "{name}"'), stub.count(f'"model": "{BASE}"')) == (8, 8)
    assert versions(tmp_path) == [name]


def test_the_same_content_is_not_loaded_again(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """But it is the newest then, so that others leave before it."""
    publish = publishing(model, stub, tmp_path)
    first = publish.publish()
    second = is_trained_and_published(publish, model)
    with torch.no_grad():
        saved = [each.clone() for each in model.parameters()]
    assert publish.publish() == second
    assert stub.count("/load_lora") == 2
    third = is_trained_and_published(publish, model)
    assert publish.loaded == (second, third)
    with torch.no_grad():
        for parameter, before in zip(model.parameters(), saved, strict=True):
            parameter.copy_(before)
    assert publish.publish() == second
    assert publish.loaded == (third, second)
    assert (first in stub.adapters, stub.count("/load_lora")) == (False, 3)


def test_an_adapter_that_adds_nothing_may_answer_as_the_base(stub: StubVllm, tmp_path: Path) -> None:
    """Before the first step there is nothing to be told apart."""
    fresh = tunerkit.wrap(Decoder(), "lora", {"rank": 4, "targets": ["q_proj"]})
    with pytest.warns(tunerkit.TunerkitWarning, match="it adds nothing"):
        name = publishing(fresh, stub, tmp_path).publish()
    assert name in stub.adapters


def test_the_oldest_leaves_and_its_files_stay_for_one_more_publish(
    model: nn.Module, stub: StubVllm, tmp_path: Path
) -> None:
    """A request that has just ended may still make the server read them."""
    publish = publishing(model, stub, tmp_path)
    names = [is_trained_and_published(publish, model) for _ in range(3)]
    assert publish.loaded == tuple(names[1:]) == tuple(stub.adapters)
    assert versions(tmp_path) == sorted(names)
    names.append(is_trained_and_published(publish, model))
    assert tuple(stub.adapters) == tuple(names[2:])
    assert versions(tmp_path) == sorted(names[1:])


def test_a_version_that_the_engine_loads_again_leaves_again(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """SGLang does, for a request that names it."""
    publish = publishing(model, stub, tmp_path, keep=1)
    first, second = publish.publish(), is_trained_and_published(publish, model)
    stub.adapters[first] = stub.adapters[second]
    third = is_trained_and_published(publish, model)
    assert set(stub.adapters) == {third}


def test_a_version_in_use_stays_and_the_next_idle_one_leaves(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """Several uses of one version count; more than `keep` stay if all are in use."""
    publish = publishing(model, stub, tmp_path, keep=1)
    names = [publish.publish()]
    with publish.using() as used, publish.using(names[0]):
        assert used == names[0]
        names += [is_trained_and_published(publish, model) for _ in range(2)]
        assert tuple(stub.adapters) == (names[0], names[2])
    names.append(is_trained_and_published(publish, model))
    assert tuple(stub.adapters) == (names[3],)
    with pytest.raises(PublishError, match=rf"{names[0]}' is not loaded; those that are: {names[3]}"):
        publish.using(names[0]).__enter__()


def test_using_before_anything_is_published_says_so(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """There is no latest version."""
    with pytest.raises(PublishError, match=r"call publish\(\) first"):
        publishing(model, stub, tmp_path).using().__enter__()


def test_a_server_that_was_restarted_gets_the_version_again(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """Its list counts, not our memory; the files of what it lost go."""
    publish = publishing(model, stub, tmp_path)
    old, new = publish.publish(), is_trained_and_published(publish, model)
    stub.adapters.clear()
    assert publish.publish() == new
    assert tuple(stub.adapters) == publish.loaded == (new,)
    newest = is_trained_and_published(publish, model)
    assert versions(tmp_path) == sorted([new, newest])
    assert old not in stub.adapters


def test_a_server_that_was_restarted_is_compared_anew(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """With another base, of the same name, that has no use for the adapter."""
    publish = publishing(model, stub, tmp_path)
    publish.publish()
    stub.adapters.clear()
    stub.shift, stub.ignores = 0.5, True
    with pytest.raises(PublishError, match="exactly as the base"):
        is_trained_and_published(publish, model)


def test_a_restarted_training_counts_its_earlier_versions(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """And removes what a killed one left; other folders there are not touched."""
    first = publishing(model, stub, tmp_path)
    names = [is_trained_and_published(first, model) for _ in range(2)]
    for left in (".tunerkit-new/adapter", ".tunerkit-old", "tunerkit-0123456789abcdef", "tunerkit-mine"):
        (tmp_path / left).mkdir(parents=True)
    again = publishing(model, stub, tmp_path)
    names += [is_trained_and_published(again, model) for _ in range(2)]
    assert tuple(stub.adapters) == again.loaded == tuple(names[2:])
    assert versions(tmp_path) == sorted([*names[1:], "tunerkit-mine"])


def test_what_is_loaded_already_counts_as_loaded(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """Another process may have loaded the same content since it was listed: the server answers 400."""
    name = publishing(model, stub, tmp_path).publish()
    server = to(stub)
    server.load(name, tmp_path / name)
    assert stub.count("/load_lora") == 2
    server.unload(name)
    server.unload(name)  # no error either
    assert stub.adapters == {}


# --- Ranks ------------------------------------------------------------------------------------------------------------


def test_the_rank_is_the_same_while_adalora_prunes(stub: StubVllm, tmp_path: Path) -> None:
    """R holds the initial rank: 10 is above 8, where most pruned layers end."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    settings = {"init_rank": 10, "target_rank": 2, "targets": ["0", "2"], "delta_t": 1, "t_init": 0, "t_final": 2}
    model = tunerkit.wrap(net, "adalora", settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    tunerkit.attach(model, optimizer, total_steps=8)
    tuner = tunerkit.tuner(model)
    publish, ranks, largest = publishing(model, stub, tmp_path), [], []
    for _ in range(8):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ranks.append(read_folder(tmp_path / publish.publish()).ranks)
        largest.append(max(tuner.ranks().values()))
    assert (largest[0], ranks) == (10, [frozenset({16})] * 8)
    assert largest[-1] <= 4


def test_a_rank_may_be_given(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """It is not only one of those that servers are started with."""
    assert read_folder(tmp_path / publishing(model, stub, tmp_path, rank=5).publish()).ranks == {5}


def test_a_method_whose_adapters_name_no_rank_is_measured(stub: StubVllm, tmp_path: Path) -> None:
    """By its products: here 10, from a matrix that all layers share."""
    pytest.importorskip("tunerkit_methods")
    model = tunerkit.wrap(Decoder(), "vera", {"rank": 10, "targets": ["q_proj"]})
    perturb_(model)
    assert read_folder(tmp_path / publishing(model, stub, tmp_path).publish()).ranks == {16}


def test_an_adapter_that_grows_above_its_rank_is_refused(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """The versions before stay."""
    publish = publishing(model, stub, tmp_path)
    name = publish.publish()
    for adapter in tunerkit.tuner(model).adapters().values():
        resize_(adapter.get_parameter("a"), torch.ones(9, 16))
        resize_(adapter.get_parameter("b"), torch.ones(len(adapter.get_parameter("b")), 9))
    with pytest.raises(PublishError, match=r"a rank of 9, above the 8 .*larger rank="):
        publish.publish()
    assert (versions(tmp_path), tuple(stub.adapters)) == ([name], (name,))


@pytest.mark.parametrize("settings", [{"rank": 513}, {"rank": 0}, {"keep": 0}, {"prefix": "a/b"}, {"prefix": ""}])
def test_bad_arguments_are_refused_at_once(
    settings: dict[str, Any], model: nn.Module, stub: StubVllm, tmp_path: Path
) -> None:
    """Nothing is written or asked."""
    with pytest.raises(PublishError, match=f"{next(iter(settings))}: expected"):
        publishing(model, stub, tmp_path, **settings)
    assert (stub.asked, versions(tmp_path)) == ([], [])


def test_a_rank_above_all_that_engines_take_is_refused(stub: StubVllm, tmp_path: Path) -> None:
    """The error names the largest."""
    model = tunerkit.wrap(nn.Sequential(nn.Linear(600, 600)), "lora", {"rank": 600, "targets": ["0"]})
    with pytest.raises(PublishError, match="largest rank is 600, and engines take 512 at most"):
        publishing(model, stub, tmp_path).publish()


# --- Adapters that no engine loads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("lora", {"bias": "adapters"}, r"no biases, heads .*Train without them, or .*tunerkit merge"),
        ("lora", {"train_modules": ["o_proj"]}, r"no biases, heads .*modules_to_save"),
        ("loha", {}, r"not a product .*--to lora --rank 16"),
    ],
)
def test_what_is_no_lora_alone_is_refused(
    method: str, settings: dict[str, Any], says: str, stub: StubVllm, tmp_path: Path
) -> None:
    """In one error with the way out, before anything is loaded or left behind."""
    model = tunerkit.wrap(Decoder(), method, {"rank": 2, "targets": ["q_proj"], **settings})
    perturb_(model)
    with pytest.raises(PublishError, match=says):
        publishing(model, stub, tmp_path).publish()
    assert (stub.count("/load_lora"), versions(tmp_path)) == (0, [])


def test_an_adapter_of_several_processes_is_refused(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """Each process would publish, or wait for others that do not."""

    class Shared(Engine):
        is_shared = True

    tunerkit.tuner(model).engine = Shared()
    with pytest.raises(PublishError, match=r"several processes.*tunerkit.export.*in the first publisher\(folder, url"):
        publishing(model, stub, tmp_path).publish()


def test_weights_that_are_not_finite_are_refused(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """As `export` refuses them; no advice about other methods."""
    with torch.no_grad():
        next(each for each in model.parameters() if each.requires_grad).fill_(float("nan"))
    with pytest.raises(PublishError, match="cannot be published") as refused:
        publishing(model, stub, tmp_path).publish()
    assert "convert" not in str(refused.value)


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_published_as_it_is(stub: StubVllm, tmp_path: Path) -> None:
    """Bytes and rank stay; it is read anew at each publish."""
    source = random_folder(tmp_path / "adapter", rank=12)
    publish = publishing(source, stub, tmp_path / "there")
    name = publish.publish()
    for file in source.iterdir():
        assert (tmp_path / "there" / name / file.name).read_bytes() == file.read_bytes()
    random_folder(source, rank=12)
    assert publish.publish() != name


@pytest.mark.parametrize("settings", [{"peft_type": "ADALORA"}, {"use_dora": True}, {"bias": "all"}])
def test_a_folder_that_the_engine_refuses_is_not_sent(settings: dict[str, Any], stub: StubVllm, tmp_path: Path) -> None:
    """The engine's rules are those of check-serving."""
    source = random_folder(tmp_path / "adapter", **settings)
    with pytest.raises(PublishError, match="tunerkit merge"):
        publishing(source, stub, tmp_path / "there").publish()
    assert (stub.count("/load_lora"), versions(tmp_path / "there")) == (0, [])


def test_a_folder_that_is_none_is_named(stub: StubVllm, tmp_path: Path) -> None:
    """By its own path."""
    with pytest.raises(PublishError, match=str(tmp_path / "adapter")):
        publishing(tmp_path / "adapter", stub, tmp_path / "there").publish()
    with pytest.raises(PublishError, match="a folder is published as it is"):
        publishing(tmp_path, stub, tmp_path, rank=8)


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_full_disk_leaves_the_versions_before(
    step: str, model: nn.Module, stub: StubVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the adapter is being written or moved to its place; the next publish works."""
    publish = publishing(model, stub, tmp_path)
    name = publish.publish()

    def full(self: Path, *arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    perturb_(model)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text" if step == "write" else "rename", full)
        with pytest.raises(PublishError, match="No space left on device"):
            publish.publish()
        assert (versions(tmp_path), tuple(stub.adapters)) == ([name], (name,))
    assert publish.publish() in stub.adapters


def test_a_folder_that_cannot_be_written_is_one_error(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """Here it is a file."""
    (tmp_path / "there").write_text("")
    with pytest.raises(PublishError, match=r"there: a version cannot be written: .*pass folder="):
        publishing(model, stub, tmp_path / "there").publish()


def test_an_interrupt_while_writing_leaves_no_version(
    model: nn.Module, stub: StubVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not whole has no version's name."""

    def interrupt(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        publishing(model, stub, tmp_path).publish()
    assert versions(tmp_path) == []


# --- Servers ----------------------------------------------------------------------------------------------------------


def test_a_broken_connection_is_tried_again(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """As often as there are waits."""
    stub.breaks = 2
    assert publishing(model, stub, tmp_path).publish() in stub.adapters
    assert stub.count("/v1/models") == 2 + 2


def test_a_server_that_does_not_answer_is_asked_once(stub: StubVllm) -> None:
    """It may still be at work, so the request is not sent again."""
    stub.free.clear()
    try:
        with pytest.raises(PublishError, match=r"/v1/models: no answer within 0\.1 s; is the server overloaded"):
            to(stub, timeout=0.1).listed()
    finally:
        stub.free.set()
    assert stub.count("/v1/models") <= 1


def test_a_dead_server_is_one_error_before_anything_is_written(model: nn.Module, tmp_path: Path) -> None:
    """The error names the address and what was tried."""
    with running() as stub:
        publish = publishing(model, stub, tmp_path)
    with pytest.raises(PublishError, match=rf"{stub.url}/v1/models: no connection .*tried 3 times; is the server run"):
        publish.publish()
    assert versions(tmp_path) == []


def test_a_server_that_dies_after_loading_is_one_error(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """Once it is back, the same version is published; the one before stays."""
    publish = publishing(model, stub, tmp_path)
    first = publish.publish()
    stub.dies_after_load = True
    perturb_(model)
    with pytest.raises(PublishError, match="no connection"):
        publish.publish()
    assert [*publish.loaded] == [first]
    stub.dies_after_load, stub.breaks = False, 0
    second = publish.publish()
    assert [*publish.loaded] == [first, second]
    assert sorted(stub.adapters) == versions(tmp_path) == sorted([first, second])


@pytest.mark.parametrize(
    ("status", "words", "advice"),
    [
        (400, "Maximum number of max_cpu_loras (2) reached", r"--max-loras of one more than keep"),
        (400, "LoRA is not enabled. Use --enable-lora to enable LoRA.", r"--enable-lora and VLLM_ALLOW_RUNTIME"),
        (500, "boom", r"status 500, 'boom'\. The server's log"),
    ],
)
def test_what_the_server_says_is_quoted_with_advice(
    status: int, words: str, advice: str, model: nn.Module, stub: StubVllm, tmp_path: Path
) -> None:
    """Nothing is loaded, and the files go at the next publish."""
    stub.says = (status, words)
    publish = publishing(model, stub, tmp_path)
    with pytest.raises(PublishError, match=advice) as refused:
        publish.publish()
    assert words in str(refused.value)
    stub.says = None
    name = is_trained_and_published(publish, model)
    assert versions(tmp_path) == [name]


def test_a_server_that_does_not_load_at_run_time_is_named(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """It has no such route."""
    stub.routes = False
    with pytest.raises(PublishError, match=r"status 404, 'Not Found'.*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        publishing(model, stub, tmp_path).publish()


def test_a_rank_above_the_servers_is_named(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """With both ways out."""
    stub.max_rank = 4
    with pytest.raises(PublishError, match=r"LoRA rank 8 is greater .*larger --max-lora-rank, or .*smaller rank"):
        publishing(model, stub, tmp_path).publish()


def test_a_folder_that_the_server_cannot_see_is_named(stub: StubVllm, tmp_path: Path) -> None:
    """As in a container, or on another machine."""
    with pytest.raises(PublishError, match=r"No adapter found for .*same folder under the same path: pass folder="):
        to(stub).load("a", tmp_path / "elsewhere")


def test_an_adapter_that_the_server_ignores_is_an_error(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """It is unloaded again, and ``probe=False`` takes it as it is."""
    stub.ignores = True
    with pytest.raises(PublishError, match=r"exactly as the base 'base' does.*another base model.*probe=False"):
        publishing(model, stub, tmp_path).publish()
    assert stub.adapters == {}
    asked = stub.count("/v1/completions")
    assert publishing(model, stub, tmp_path, probe=False).publish() in stub.adapters
    assert stub.count("/v1/completions") == asked


def test_a_version_that_is_not_listed_points_to_replicas(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """Another one than the one that loaded it may have answered."""
    stub.forgets = True
    with pytest.raises(PublishError, match="does not list it: are there several replicas"):
        publishing(model, stub, tmp_path).publish()


def test_a_key_is_sent_and_not_shown(
    model: nn.Module, stub: StubVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an argument or in vLLM's own variable; without it the error says so."""
    stub.key = "secret"
    with pytest.raises(PublishError, match=r"status 401.*VLLM_API_KEY"):
        publishing(model, stub, tmp_path).publish()
    assert publisher(model, stub.url, folder=tmp_path, key="secret").publish() in stub.adapters
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    found = publisher(model, f"{stub.url}/v1/", folder=tmp_path)
    assert found.publish() in stub.adapters
    assert "secret" not in repr(found)


@pytest.mark.parametrize("key", ["two\nlines", "schlüssel"])
def test_a_key_that_no_header_takes_is_refused_unseen(key: str, model: nn.Module) -> None:
    """A line's end after it is left out."""
    with pytest.raises(PublishError, match="expected one line of ASCII") as refused:
        publisher(model, "http://localhost:8000", key=key)
    assert key not in str(refused.value)
    assert VllmServer.at("http://localhost:8000", "secret\n").key == "secret"


@pytest.mark.parametrize("url", ["host:8000", "ftp://host", "http://", "http://host:x", ""])
def test_what_is_no_address_is_refused(url: str, model: nn.Module) -> None:
    """Before anything is asked."""
    with pytest.raises(PublishError, match="expected a URL such as http://host:8000, got"):
        publisher(model, url)


@pytest.mark.parametrize("answer", ["<html>", [], {"data": []}, {"data": None}, {}])
def test_another_servers_answers_are_quoted(
    answer: Any, model: nn.Module, stub: StubVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they are."""
    monkeypatch.setattr(stub, "answer", lambda *request: (200, answer))
    with pytest.raises(PublishError, match=r"/v1/models.*got|expected .*/v1/models, got"):
        publishing(model, stub, tmp_path).publish()
    with pytest.raises(PublishError, match="completions"):
        to(stub).sample("a", [([1], Sampling(max_tokens=1))])


def test_the_configs_written_name_nothing_of_this_machine(model: nn.Module, stub: StubVllm, tmp_path: Path) -> None:
    """Equal adapters have equal names wherever they are published from."""
    name = publishing(model, stub, tmp_path / "a").publish()
    assert str(tmp_path) not in json.dumps(json.loads((tmp_path / "a" / name / "adapter_config.json").read_text()))
    assert publishing(model, stub, tmp_path / "b").publish() == name
