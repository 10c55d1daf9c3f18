"""The commands on adapters of any format: convert, verify, diff, show and merge, and what chooses their base model."""

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st

import tunerkit
from plugins.cli.tests.product_plugin import ProductPlugin, trained
from tests.support.tiny_classifier import save_tiny_classifier
from tests.support.tiny_models import save_tiny_llama, save_tiny_t5, save_tiny_vit
from tests.support.train_command import command, succeeded
from tunerkit.plugin import Factors
from tunerkit_cli.converting.comparison import difference, norm, relative, relative_tensor
from tunerkit_cli.converting.opening import collected
from tunerkit_cli.converting.verification import random_inputs
from tunerkit_testing.registering import registered
from tunerkit_transformers.base_choice import choose_base
from tunerkit_transformers.bases import Base, skeleton, whole

LLAMA = "AutoModelForCausalLM"
Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Base models, and adapters of them in tunerkit's and in the toy format; the working folder."""
    path = tmp_path_factory.mktemp("convert")
    with registered(ProductPlugin()), pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("HF_HUB_OFFLINE", "1")
        save_tiny_llama(path / "llama")
        save_tiny_classifier(path / "bert")
        save_tiny_t5(path / "t5")
        save_tiny_vit(path / "vit")
        for name, weights in (("shapes", "llama"), ("bert-shapes", "bert")):
            shutil.copytree(path / weights, path / name)
            (path / name / "model.safetensors").unlink()
        model = trained(whole(Base("llama", LLAMA)), targets=["q_proj", "v_proj"], ranks={Q0: 1, V1: 5}, bias="none")
        tunerkit.save(model, path / "own")
        tunerkit.export(model, path / "toy", "toy", base="llama")
        model = whole(Base("bert", "AutoModelForSequenceClassification", labels=3))
        tunerkit.save(trained(model, targets=["query"], train_modules=["classifier"], bias="adapters"), path / "heads")
        yield path


def told(*arguments: object) -> Any:
    """What a command prints as JSON."""
    return json.loads(succeeded(*arguments, "--json").stdout)


# --- convert ---


def test_an_adapter_goes_to_another_format_and_back_without_the_weights_of_its_base(folder: Path) -> None:
    """Law: converting reads no weights, for there are none, and what comes back adds the same products."""
    found = told("convert", "own", "--to", "toy", "--out", "went", "--base", "shapes", "--set", "labels=3")
    assert (found["format"], found["method"], found["base"]) == ("toy", "toy-product", "shapes")
    assert found["ranks"][Q0] == 1
    assert found["ranks"][V1] == 5
    assert found["size"] == sum(file.stat().st_size for file in Path("went").iterdir())
    assert json.loads(Path("went/base.json").read_text()) == {"base": "", "labels": 3}
    done = succeeded("convert", "went", "--to", "tunerkit", "--out", "came/back.safetensors", "--base", "shapes")
    assert "a base with other values in the same shapes will not be refused" in done.output
    assert told("diff", "own", "came/back.safetensors", "--base", "shapes")["largest"] < 1e-6
    model = tunerkit.load(whole(Base("llama", LLAMA)), "came/back.safetensors")
    assert tunerkit.tuner(model).ranks() == found["ranks"]


def test_the_base_is_found_where_the_files_say_it_is(folder: Path) -> None:
    """Without ``--base``, the description's is taken, and a run's record names base, class and labels."""
    assert told("convert", "toy", "--to", "tunerkit", "--out", "named")["base"] == "llama"
    shown = succeeded("convert", "toy", "--to", "tunerkit", "--out", "named", "--overwrite").output
    assert "llama" not in shown  # the file does not hold it
    shutil.copytree("heads", "run")
    record = {"version": 1, "task": "text-classification", "model": {"source": "bert"}, "labels": ["a", "b", "c"]}
    Path("run/run.json").write_text(json.dumps(record))
    chosen = choose_base("run", base=None, task=None)
    assert (chosen.source, chosen.kind, chosen.labels) == ("bert", "AutoModelForSequenceClassification", 3)
    assert choose_base("run", base="bert-shapes", task="token-classification").kind.endswith("TokenClassification")


def test_the_class_of_a_lone_file_is_the_one_that_has_what_its_header_lists(folder: Path) -> None:
    """The folder's own architecture may be another; a head that is trained in full has its own number of classes."""
    chosen = choose_base("heads", base="bert-shapes", task=None)
    assert (chosen.kind, chosen.labels) == ("BertForSequenceClassification", 3)
    config = json.loads(Path("bert-shapes/config.json").read_text())
    shutil.copytree("bert-shapes", "masked")
    Path("masked/config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    chosen = choose_base("heads", base="masked", task=None)
    assert (chosen.kind, chosen.labels) == ("AutoModelForSequenceClassification", 3)
    bare = trained(transformers.AutoModel.from_pretrained("bert"), targets=["query"])
    tunerkit.save(bare, "bare")
    assert choose_base("bare", base="bert-shapes", task=None).kind == "AutoModel"


def test_a_class_without_the_modules_that_a_format_trains_in_full_is_passed_over(folder: Path) -> None:
    """A description lists them: without the head in it, a language model would have all targets too."""
    shutil.copytree("toy", "toy-head")
    for copies, kind in (([], "LlamaForCausalLM"), (["score"], "AutoModelForSequenceClassification")):
        facts = {"base": "shapes", "labels": 7, "copies": copies}
        Path("toy-head/base.json").write_text(json.dumps(facts))
        assert choose_base("toy-head", base=None, task=None).kind == kind
    assert choose_base("toy-head", base=None, task=None).labels == 7
    assert told("show", "toy-head")["copies"] == ["score"]


@pytest.mark.parametrize("command_", ["diff", "verify"])
def test_the_base_is_taken_from_whichever_of_two_adapters_names_it(command_: str, folder: Path) -> None:
    """A lone file names none; the order of the two does not matter."""
    assert told(command_, "own", "toy")["is_equal"]
    assert told(command_, "toy", "own")["is_equal"]
    done = command(command_, "own", "own")
    assert done.exit_code == 2
    assert "own does not say what its base model is" in done.output


def test_a_place_that_is_taken_is_only_written_with_overwrite(folder: Path) -> None:
    """A folder with files and a file; the folder of a model never is, since its adapter would be loaded with it."""
    written = ("convert", "own", "--to", "toy", "--base", "shapes", "--out")
    Path("filled").mkdir()
    succeeded(*written, "filled")  # it is empty
    Path("filled/notes.txt").write_text("mine")
    done = command(*written, "filled")
    assert (done.exit_code, "the folder is not empty" in done.output) == (2, True)
    succeeded(*written, "filled", "--overwrite")
    assert Path("filled/notes.txt").read_text() == "mine"
    succeeded("convert", "toy", "--to", "tunerkit", "--out", "one.safetensors")
    done = command("convert", "toy", "--to", "tunerkit", "--out", "one.safetensors")
    assert (done.exit_code, "there is such a file" in done.output) == (2, True)
    names = sorted(file.name for file in Path("bert").iterdir())
    done = command(*written, "bert", "--overwrite")
    assert (done.exit_code, "holds a model (model.safetensors)" in done.output) == (2, True)
    assert sorted(file.name for file in Path("bert").iterdir()) == names
    shutil.copytree("shapes", "own-config")  # a config alone is no model
    succeeded(*written, "own-config", "--overwrite")


def test_an_error_offers_a_task_only_where_another_class_may_help(folder: Path) -> None:
    """Not for a base whose shapes are the problem."""
    config = json.loads(Path("shapes/config.json").read_text())
    shutil.copytree("shapes", "wider")
    wider = config["hidden_size"] * 2
    Path("wider/config.json").write_text(json.dumps({**config, "hidden_size": wider, "head_dim": None}))
    done = command("convert", "own", "--to", "toy", "--out", "never", "--base", "wider")
    assert (done.exit_code, "--base" in done.output, "--task" in done.output) == (2, True, False)
    done = command("convert", "own", "--to", "toy", "--out", "never", "--base", "vit")
    assert (done.exit_code, "--task" in done.output) == (2, True)


def test_the_name_of_a_format_is_guessed_whatever_the_case_of_its_letters(folder: Path) -> None:
    """The list of formats has tunerkit's own."""
    done = command("convert", "own", "--to", "TOY", "--out", "never", "--base", "shapes")
    assert done.exit_code == 2
    assert "did you mean 'toy'?" in done.output
    assert "tunerkit" in done.output.partition("installed: ")[2]


def test_a_remark_of_several_lines_is_told_as_one() -> None:
    """In JSON and as a note alike; one that comes twice is told once."""
    with collected() as remarks:
        for _ in range(2):
            warnings.warn("some are left out:\n- a\n- b", tunerkit.TunerkitWarning, stacklevel=1)
        warnings.warn("a library's", UserWarning, stacklevel=1)
    assert remarks == ["some are left out: a; b"]


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit"])
def test_a_skeleton_has_the_names_and_shapes_of_the_model(name: str, folder: Path) -> None:
    """And no values; what is tied in the model is tied in it, and it runs in no class but its own."""
    kind = json.loads((folder / name / "config.json").read_text())["architectures"][0]
    bare, full = skeleton(Base(name, kind)), whole(Base(name, kind))
    assert type(bare) is type(full)
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert [(n, p.shape) for n, p in bare.named_parameters()] == [(n, p.shape) for n, p in full.named_parameters()]
    bare_names, names = (dict(model.named_parameters(remove_duplicate=False)) for model in (bare, full))
    assert bare_names.keys() == names.keys()


# --- verify ---


def test_equal_adapters_give_equal_outputs_and_other_ones_do_not(folder: Path) -> None:
    """The exit code is 1 if they differ; the numbers are relative to the largest output and to the effect."""
    found = told("verify", "own", "toy", "--base", "llama")
    assert found["is_equal"]
    assert found["difference"] <= 1e-5 * found["largest"]
    tunerkit.save(trained(whole(Base("llama", LLAMA)), targets=["up_proj"]), "another")
    done = command("verify", "own", "another", "--base", "llama", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1
    assert found["relative"] == pytest.approx(found["difference"] / found["largest"])
    assert found["of_effect"] > 0.1
    assert "differ by more than 1e-05" in command("verify", "own", "another", "--base", "llama").output


def test_an_adapter_equals_its_merged_model(folder: Path) -> None:
    """B may be a folder with config.json and weights; the base itself is no such model, unless A adds nothing."""
    succeeded("merge", "toy", "--out", "merged")
    assert told("verify", "toy", "merged")["is_equal"]
    assert command("verify", "toy", "llama").exit_code == 1
    assert {file.name for file in Path("merged").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    untrained = tunerkit.wrap(whole(Base("llama", LLAMA)), "toy-product", {"targets": ["q_proj"]})
    with pytest.warns(tunerkit.TunerkitWarning, match="untrained"):
        tunerkit.save(untrained, "idle")
    done = succeeded("verify", "idle", "llama", "--base", "llama")
    assert "changes no output of the base" in done.output


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit"])
def test_random_inputs_fit_the_model_and_are_the_same_each_time(name: str, folder: Path) -> None:
    """Texts, pairs of texts and images: the model runs on them, and one seed gives one set."""
    kind = json.loads((folder / name / "config.json").read_text())["architectures"][0]
    model = whole(Base(name, kind))
    inputs, again = random_inputs(model), random_inputs(model)
    for one, other in zip(inputs, again, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
        with torch.no_grad():
            assert torch.isfinite(model(**one).logits).all()


class Reading(torch.nn.Module):
    """Takes ids of tokens, and has no config."""

    main_input_name = "input_ids"

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids


def test_a_model_with_unknown_inputs_is_refused_by_name() -> None:
    """A module of other inputs, and a config that lacks what they depend on."""
    with pytest.raises(tunerkit.TunerkitError, match="Linear takes inputs of its own, for which tunerkit makes no"):
        random_inputs(torch.nn.Linear(2, 2))
    with pytest.raises(tunerkit.TunerkitError, match="Reading takes inputs that its config does not describe"):
        random_inputs(Reading())


# --- diff ---


def test_diff_names_the_places_and_the_ranks_that_differ_the_worst_first(folder: Path) -> None:
    """A target of one adapter alone counts 1, unless it adds nothing."""
    ranks = {Q0: 3, V1: 5}
    tunerkit.save(trained(whole(Base("llama", LLAMA)), targets=["self_attn.q_proj", "up_proj"], ranks=ranks), "third")
    done = command("diff", "own", "third", "--base", "shapes", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1
    assert found["only"][0] == ["model.layers.0.self_attn.v_proj", V1]
    assert [path.rpartition(".")[2] for path in found["only"][1]] == ["up_proj", "up_proj"]
    assert found["ranks"] == {Q0: [1, 3]}
    assert list(found["products"].values()) == sorted(found["products"].values(), reverse=True)
    shown = command("diff", "own", "third", "--base", "shapes").output
    assert "different: at most" in shown
    assert f"{Q0}: 1 and 3" in shown


def test_diff_compares_copies_and_biases_too(folder: Path) -> None:
    """An adapter equals itself; with one value changed in its head it does not."""
    assert told("diff", "heads", "heads", "--base", "bert-shapes")["is_equal"]
    model = tunerkit.load(whole(choose_base("heads", base="bert", task=None)), "heads")
    with torch.no_grad():
        model.get_submodule("classifier.tunerkit.default.copy").get_parameter("bias")[1] += 1
    tunerkit.save(model, "moved")
    done = command("diff", "heads", "moved", "--base", "bert-shapes", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1
    assert [name for name, value in {**found["copies"], **found["biases"]}.items() if value] == ["classifier.bias"]


@settings(deadline=None, max_examples=30)
@given(ranks=st.tuples(st.integers(0, 5), st.integers(0, 5)), seed=st.integers(0, 999), scale=st.floats(0, 2))
def test_differences_of_products_are_those_of_the_dense_matrices(
    ranks: tuple[int, int], seed: int, scale: float
) -> None:
    """The dense matrices are the oracle; ranks may be 0, and above the width of a layer."""
    generator = torch.Generator().manual_seed(seed)
    one, other = (
        Factors(torch.randn(r, 4, generator=generator), scale * torch.randn(3, r, generator=generator)) for r in ranks
    )
    dense = [(each.p.double() @ each.q.double()) for each in (one, other)]
    assert norm(one) == pytest.approx(float(dense[0].norm()), abs=1e-9)
    assert difference(one, other) == pytest.approx(float((dense[0] - dense[1]).norm()), abs=1e-9)
    assert relative(one, one) < 1e-12
    assert relative(one, None) == float(norm(one) > 0)


def test_a_tensor_of_another_shape_is_another_tensor() -> None:
    """Its relative difference is 1; equal tensors have 0, those of zeros too."""
    assert relative_tensor(torch.ones(2), torch.ones(3)) == 1.0
    assert relative_tensor(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_tensor(torch.zeros(2), torch.ones(2)) == 1.0
    assert relative_tensor(torch.tensor([2.0, 4.0]), torch.tensor([2.0, 3.0])) == 0.25


# --- show and merge ---


def test_show_describes_a_lone_file_with_its_ranks(folder: Path) -> None:
    """The base is not needed; ranks that differ are listed."""
    found = told("show", "own")
    assert (found["format"], found["method"], found["steps"]) == ("tunerkit", "toy-product", 0)
    assert found["ranks"][V1] == 5
    assert found["size"] == Path("own/adapter.safetensors").stat().st_size
    assert told("show", "heads/adapter.safetensors")["copies"] == ["classifier"]
    shown = succeeded("show", "own").output
    assert "toy-product" in shown
    assert "1 to 5, 10 in all at 4 targets" in shown
    assert f"{V1}: 5\n" in shown


def test_show_refuses_a_file_of_which_a_byte_has_changed(folder: Path) -> None:
    """Its digest is checked as `tunerkit.load` checks it, whatever the byte belongs to."""
    content = Path("own/adapter.safetensors").read_bytes()
    for place in (40, len(content) // 3, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        Path("changed.safetensors").write_bytes(changed)
        done = command("show", "changed.safetensors")
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)


def test_show_describes_what_a_format_knows_without_a_model(folder: Path) -> None:
    """Method, base, ranks, size and settings, as the format's ``describe`` says them."""
    found = told("show", "toy")
    assert (found["format"], found["base"], found["settings"]) == ("toy", "llama", {"scale": 0.5})
    assert found["ranks"] == told("show", "own")["ranks"]


def test_a_part_of_a_pipeline_of_diffusers_is_a_base_too(folder: Path) -> None:
    """Its config names its class; convolutions are adapted. Its inputs are none that `verify` could draw."""
    diffusers = pytest.importorskip("diffusers", reason="the base is one of its UNets")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    model.save_pretrained("pipe/unet")
    Path("pipe/model_index.json").write_text("{}")
    tunerkit.save(trained(model, targets=["to_q", "conv1"]), "latent")
    told("convert", "latent", "--to", "toy", "--out", "latent-toy", "--base", "pipe/unet", "--set", "base=pipe/unet")
    assert "UNet2DConditionModel takes inputs of its own" in command("verify", "latent", "latent-toy").stderr
    assert told("diff", "latent-toy", "latent", "--base", "pipe/unet")["is_equal"]
    assert "targets" in succeeded("show", "latent").output
    succeeded("merge", "latent-toy", "--out", "latent-merged")
    merged = diffusers.UNet2DConditionModel.from_pretrained("latent-merged").state_dict()
    own = tunerkit.unwrap(model, keep_merged=True).state_dict()
    assert all(torch.allclose(merged[name], value, atol=1e-6) for name, value in own.items())
    done = command("convert", "latent", "--to", "toy", "--out", "none", "--base", "pipe")
    assert done.exit_code == 2
    assert "pass the folder of the adapted part, such as pipe/unet" in done.output


def test_merge_takes_the_dtype_of_the_base_and_no_more_than_it_has(folder: Path) -> None:
    """A base in bf16 stays in bf16, and one without a tokenizer gives a folder without one."""
    model: Any = whole(Base("llama", LLAMA), dtype=torch.bfloat16)
    model.save_pretrained("half")
    succeeded("merge", "toy", "--base", "half", "--out", "half-merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained("half-merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert not Path("half-merged/tokenizer.json").exists()


def test_merge_takes_the_tokenizer_beside_the_adapter_and_grows_the_embeddings(folder: Path) -> None:
    """The adapter learned its tokens, which the base's tokenizer may not have; nothing of Python is told."""
    shutil.copytree("toy", "grown")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained("llama")
    tokenizer.add_tokens([f"new{number}" for number in range(300)])
    tokenizer.save_pretrained("grown")
    assert "note:" not in succeeded("merge", "grown", "--out", "grown-merged").output
    merged: Any = transformers.AutoModelForCausalLM.from_pretrained("grown-merged")
    words = transformers.AutoTokenizer.from_pretrained("grown-merged")
    assert len(words) == len(tokenizer) == merged.get_input_embeddings().num_embeddings
    (Path("grown") / "tokenizer_config.json").write_text("{")
    done = command("merge", "grown", "--out", "damaged")
    assert done.exit_code == 2
    assert "cannot load the tokenizer beside the adapter" in done.output
    assert not Path("damaged").exists()
