"""What peft makes and diffusers saves, tunerkit loads."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tunerkit
from tunerkit import patterns
from tunerkit.plugin import factors_of

pytest.importorskip("diffusers", reason="it saves the files")
pytest.importorskip("peft", reason="it makes the adapters")
import peft  # after the skips
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers

from plugins.diffusers.tests.pipelines import (
    TOLERANCE,
    error,
    layers,
    load_as_diffusers,
    output,
    pipeline,
    text_encoder,
    transformer,
    unet,
    wrapped,
)

FILE = "pytorch_lora_weights.safetensors"


@torch.no_grad()
def peft_model(build: Callable[[], nn.Module], **config: Any) -> nn.Module:
    """The model with an adapter of peft at all layers, or at those of the config, with random weights."""
    model = build()
    settings = peft.LoraConfig(**{"r": 4, "target_modules": list(layers(model)), **config})
    peft.inject_adapter_in_model(settings, model, adapter_name="default")
    model.peft_config = {"default": settings}  # type: ignore[assignment]
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model.eval()  # also the adapters' dropout


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = peft.get_peft_model_state_dict(model)
    return found


def settings_of(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = model.peft_config["default"].to_dict()  # type: ignore[index, union-attr]
    return {name: list(value) if isinstance(value, set) else value for name, value in found.items()}


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"lora_alpha": 10, "lora_dropout": 0.1},
    "root": {"lora_alpha": 6, "use_rslora": True},
    "ranks": {"lora_alpha": 8, "rank_pattern": {"conv1": 2, r"attn\d\.to_q": 7}, "alpha_pattern": {"to_k": 3}},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_a_pipeline_saves_gives_its_output(config: dict[str, Any], tmp_path: Path) -> None:
    """``save_lora_weights`` with peft's settings: convolutions and attention, ranks and alphas by pattern, rsLoRA."""
    model = peft_model(unet, **config)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=tensors_of(model), unet_lora_adapter_metadata=settings_of(model)
    )
    loaded = tunerkit.load(unet(), tmp_path, trainable=True)
    assert error(output(loaded), output(model)) <= TOLERANCE
    own = tunerkit.tuner(loaded).config
    assert (own.alpha, own.dropout) == (config.get("lora_alpha", 8), config.get("lora_dropout", 0))  # type: ignore[attr-defined]
    assert set(tunerkit.tuner(loaded).ranks().values()) == {4, *config.get("rank_pattern", {}).values()}


@pytest.mark.parametrize("build", [unet, transformer])
def test_what_a_model_saves_gives_its_output(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """``save_lora_adapter`` writes no prefix, and the settings under their own names; any file name will do."""
    model = peft_model(build, lora_alpha=10)
    model.save_lora_adapter(tmp_path / "saved")  # type: ignore[operator]
    (tmp_path / "saved" / FILE).rename(tmp_path / "mine.safetensors")
    loaded = tunerkit.load(build(), tmp_path / "mine.safetensors")
    assert error(output(loaded), output(model)) <= TOLERANCE


def test_without_settings_the_scale_is_one(tmp_path: Path) -> None:
    """As in diffusers, whatever alpha was in training; ranks come from the tensors."""
    model = peft_model(unet, lora_alpha=4, rank_pattern={"conv1": 2}, alpha_pattern={"conv1": 2})
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=tensors_of(model))
    assert error(output(tunerkit.load(unet(), tmp_path)), output(model)) <= TOLERANCE
    assert error(output(load_as_diffusers(unet(), tmp_path)), output(model)) <= TOLERANCE


def test_one_file_for_two_models_is_loaded_into_each(tmp_path: Path) -> None:
    """A pipeline's file of a UNet and a text encoder, whose old spelling is known; a warning names the other part."""
    net, encoder = peft_model(unet), peft_model(text_encoder, target_modules=["q_proj", "out_proj", "fc1"])
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=tensors_of(net),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(tensors_of(encoder)),
        unet_lora_adapter_metadata=settings_of(net),
        text_encoder_lora_adapter_metadata=settings_of(encoder),
    )
    with pytest.warns(tunerkit.TunerkitWarning, match=r"also adapts 'text_encoder'.* at 6 modules"):
        assert error(output(tunerkit.load(unet(), tmp_path)), output(net)) <= TOLERANCE
    with pytest.warns(tunerkit.TunerkitWarning, match=r"also adapts 'unet'.* at 83 modules"):
        assert error(output(tunerkit.load(text_encoder(), tmp_path)), output(encoder)) <= TOLERANCE
    both = pipeline(denoiser=unet(), encoder=text_encoder())
    both.load_lora_weights(str(tmp_path))
    assert error(output(both.unet), output(net)) <= TOLERANCE


@pytest.mark.parametrize("spelling", ["down", "oldest"])
def test_older_spellings_are_known(spelling: str, tmp_path: Path) -> None:
    """``to_q.lora.down``, and ``processor.to_q_lora.down`` with ``to_out_lora`` for ``to_out.0``."""
    model = peft_model(unet, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    tensors = {}
    for name, tensor in tensors_of(model).items():
        path, half = name.rsplit(".lora_", 1)
        half = {"A.weight": "down.weight", "B.weight": "up.weight"}[half]
        owner, leaf = path.removesuffix(".0").rsplit(".", 1)
        old = f"{owner}.processor.{leaf}_lora.{half}" if spelling == "oldest" else f"{path}.lora.{half}"
        tensors[f"unet.{old}"] = tensor
    save_file(tensors, tmp_path / FILE)
    assert error(output(load_as_diffusers(unet(), tmp_path)), output(model)) <= TOLERANCE
    assert error(output(tunerkit.load(unet(), tmp_path)), output(model)) <= TOLERANCE


def test_an_alpha_beside_the_tensors_scales(tmp_path: Path) -> None:
    """Trainers of transformers write ``transformer.….alpha``; the scale is alpha / r, module by module."""
    file = one_layer(tmp_path, {"unet.conv_in.alpha": torch.tensor(1.0)})
    (added,) = factors_of(tunerkit.tuner(tunerkit.load(unet(), file))).values()
    tensors = load_file(file)
    a, b = tensors["unet.conv_in.lora_A.weight"].flatten(1), tensors["unet.conv_in.lora_B.weight"].flatten(1)
    torch.testing.assert_close(added.p @ added.q, b @ a / 2)


def test_training_goes_on_as_it_was(tmp_path: Path) -> None:
    """The gradient of A after loading is peft's."""
    model = peft_model(unet, lora_alpha=10, target_modules=["conv1", "to_q"])
    model.save_lora_adapter(tmp_path)  # type: ignore[operator]
    loaded = tunerkit.load(unet(), tmp_path, trainable=True)
    draw = torch.Generator().manual_seed(1)
    noise, text = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 5, 8, generator=draw)
    for each in (model, loaded):
        each(noise, torch.tensor([3]), text).sample.square().mean().backward()
    ours = dict(tunerkit.tuner(loaded).named_parameters())
    theirs = {name: each.grad for name, each in model.named_parameters() if ".lora_A." in name}
    assert len(theirs) * 2 == len(ours)
    for name, gradient in theirs.items():
        own = ours[name.replace(".lora_A.default.weight", ".adapter.a")].grad
        assert gradient is not None
        assert own is not None
        torch.testing.assert_close(own, gradient.flatten(1), rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_a_second_adapter_finds_the_layers_and_not_their_copies(tmp_path: Path) -> None:
    """Also where the first adapter trains a layer in full, as a copy inside of it."""
    model = wrapped(unet(), targets=("conv_in",), train_modules=("conv_out",))
    tunerkit.load(model, one_layer(tmp_path), adapter="second")
    assert tunerkit.tuner(model, "second").ranks() == {"conv_in": 2}


def test_a_skeleton_is_enough(tmp_path: Path) -> None:
    """Reading asks a model on the meta device for names and shapes only."""
    from tunerkit_diffusers.diffusers_reading import read

    model = peft_model(unet)
    model.save_lora_adapter(tmp_path)  # type: ignore[operator]
    found = read(tmp_path, unet().to("meta"))
    assert len(found.factors) == len(layers(unet()))
    path = "conv_in"
    torch.testing.assert_close(found.factors[path].q, found.tensors[path]["a"])


def one_layer(folder: Path, more: Mapping[str, Tensor | None] = {}, **metadata: str) -> Path:
    """A file that adapts ``conv_in`` of `unet` with rank 2, and what else is given; None removes a tensor."""
    draw = torch.Generator().manual_seed(4)
    tensors: dict[str, Tensor | None] = {
        "unet.conv_in.lora_A.weight": torch.randn(2, 4, 3, 3, generator=draw),
        "unet.conv_in.lora_B.weight": torch.randn(8, 2, 1, 1, generator=draw),
        **more,
    }
    save_file({name: each for name, each in tensors.items() if each is not None}, folder / FILE, metadata or None)
    return folder / FILE


A, B = "unet.conv_in.lora_A.weight", "unet.conv_in.lora_B.weight"
BAD: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "a missing half": ({B: None}, r"conv_in\.lora_A.*lora_B of 'conv_in' is missing"),
    "the other half": ({A: None}, r"conv_in\.lora_B.*lora_A of 'conv_in' is missing"),
    "NaN": ({A: torch.full((2, 4, 3, 3), float("nan"))}, r"conv_in\.lora_A.*NaN or inf"),
    "whole numbers": ({A: torch.ones(2, 4, 3, 3, dtype=torch.int64)}, r"conv_in\.lora_A.*int64"),
    "another kernel": ({A: torch.ones(2, 4, 1, 1)}, r"conv_in\.lora_A.*\(2, 4, 1, 1\), expected \(r, 4, 3, 3\)"),
    "another width": ({B: torch.ones(9, 2, 1, 1)}, r"conv_in\.lora_B.*\(9, 2, 1, 1\), expected \(8, 2\)"),
    "other ranks": ({B: torch.ones(8, 3, 1, 1)}, r"conv_in\.lora_B.*\(8, 3, 1, 1\), expected \(8, 2\)"),
    "rank 0": ({A: torch.ones(0, 4, 3, 3), B: torch.ones(8, 0, 1, 1)}, r"conv_in\.lora_A.*rank 0"),
    "an unknown key": ({"unet.conv_in.lora_C.weight": torch.ones(2)}, r"lora_C.weight' is unknown; expected"),
    "an unknown layer": ({"unet.conv_on.lora_A.weight": torch.ones(2)}, r"conv_on.*no linear.*did you mean 'conv_in'"),
    "a norm": ({"unet.conv_norm_out.lora_A.weight": torch.ones(2)}, r"conv_norm_out.*no linear or convolution"),
    "a foreign prefix": ({"model.x.lora_A.weight": torch.ones(2), A: None, B: None}, r"model\.x.*names no linear"),
    "one foreign prefix": ({"model.x.lora_A.weight": torch.ones(2)}, r"'model\.x' begins with no part of a pipeline"),
    "twice": ({"unet.conv_in.lora.down.weight": torch.ones(2)}, "are the same tensor of the same module"),
    "DoRA": ({"unet.conv_in.lora_magnitude_vector": torch.ones(8)}, r"lora_magnitude_vector' belongs to DoRA.*Merge"),
    "a bias of B": ({"unet.conv_in.lora_B.bias": torch.ones(8)}, "a trained bias"),
    "LoKr": ({"unet.conv_in.lokr_w1": torch.ones(8)}, "LoKr"),
    "an alpha of 0": ({"unet.conv_in.alpha": torch.tensor(0.0)}, "alpha' must be a number above 0, got 0.0"),
    "two alphas": ({"unet.conv_in.alpha": torch.ones(2)}, "alpha' must be a number above 0"),
}


@pytest.mark.parametrize(("more", "message"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_by_its_key(more: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    """One error names the file and the key, and the model stays as it was."""
    file, model = one_layer(tmp_path, more), unet()
    with pytest.raises(tunerkit.errors.FileError, match=message) as caught:
        tunerkit.load(model, file)
    assert FILE in str(caught.value)
    assert not any("tunerkit" in path for path, _ in model.named_modules())


def test_another_part_of_the_pipeline_is_named(tmp_path: Path) -> None:
    """A UNet's file does not go onto a transformer or a text encoder."""
    one_layer(tmp_path)
    with pytest.raises(
        tunerkit.errors.BaseMismatchError, match=r"adapts 'unet'.*SD3Transformer2DModel is 'transformer'"
    ):
        tunerkit.load(transformer(), tmp_path)
    with pytest.raises(tunerkit.errors.BaseMismatchError, match=r"CLIPTextModel is 'text_encoder'.*pipeline.unet"):
        tunerkit.load(text_encoder(), tmp_path)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    """Text, a file that was cut, an empty one, a pickle, several candidates."""
    whole = one_layer(tmp_path).read_bytes()
    for content, message in (
        (b"this is text, not a file of tensors", "header is incomplete"),
        (whole[: len(whole) // 2], "cannot be read as a safetensors file"),
        (whole[:20], "header is incomplete"),
        (b"", "header is incomplete"),
        (b"\x04\0\0\0\0\0\0\0[]  ", "not a JSON object"),
    ):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(tunerkit.errors.FileError, match=message):
            tunerkit.load(unet(), tmp_path)
    save_file({}, tmp_path / FILE)
    with pytest.raises(tunerkit.errors.FileError, match="holds no tensors"):
        tunerkit.load(unet(), tmp_path)
    (tmp_path / FILE).rename(tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(tunerkit.errors.FileError, match="is a pickle"):
        tunerkit.load(unet(), tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(one_layer(tmp_path), tmp_path / name)
    (tmp_path / FILE).unlink()
    with pytest.raises(
        tunerkit.errors.FileError, match=r"2 adapters.*a.safetensors, b.safetensors; pass the path of one"
    ):
        tunerkit.load(unet(), tmp_path)


SETTINGS: dict[str, tuple[object, str]] = {
    "no JSON": ("{", "is not JSON"),
    "a list": ([1], "must be a JSON object"),
    "text for r": ({"unet.r": "two"}, "r in the metadata must be a whole number above 0, got 'two'"),
    "a share for r": ({"unet.r": 2.5}, "r in the metadata must be a whole number"),
    "text for alpha": ({"unet.lora_alpha": "8"}, "lora_alpha in the metadata must be a number above 0, got '8'"),
    "a negative alpha": ({"unet.lora_alpha": -8, "unet.r": 2}, "lora_alpha in the metadata must be a number above 0"),
    "text for dropout": ({"unet.lora_dropout": "no", "unet.r": 2}, "lora_dropout in the metadata"),
    "another rank": ({"unet.r": 8}, "'conv_in' have rank 2, and r and rank_pattern in the metadata say 8"),
    "a list of ranks": ({"unet.rank_pattern": [8]}, "rank_pattern in the metadata must be a JSON object"),
    "a bad pattern": ({"unet.r": 2, "unet.alpha_pattern": {"conv(": 1}}, "a pattern in the metadata cannot be used"),
    "two alphas": ({"unet.r": 2, "unet.alpha_pattern": {"conv_.*": 1, "conv_in": 3}}, "the alphas 1 and 3, and JSON"),
    "DoRA": ({"unet.r": 2, "unet.use_dora": True}, "setting 'use_dora' is True"),
    "a copy": ({"unet.r": 2, "unet.modules_to_save": ["conv_out"]}, r"'modules_to_save' is \['conv_out'\]"),
    "biases": ({"unet.r": 2, "unet.bias": "all"}, "setting 'bias' is 'all'"),
    "PiSSA": ({"unet.r": 2, "unet.init_lora_weights": "pissa_niter_4"}, "'init_lora_weights' is 'pissa_niter_4'"),
    "AdaLoRA": ({"unet.peft_type": "ADALORA"}, "peft_type is 'ADALORA'"),
}


@pytest.mark.parametrize(("settings", "message"), SETTINGS.values(), ids=SETTINGS)
def test_bad_settings_are_refused_by_name(settings: object, message: str, tmp_path: Path) -> None:
    """Whatever JSON the metadata holds."""
    text = settings if isinstance(settings, str) else json.dumps(settings)
    file = one_layer(tmp_path, lora_adapter_metadata=text)
    with pytest.raises(tunerkit.errors.FileError, match=message):
        tunerkit.load(unet(), file)


def test_a_slow_pattern_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file cannot hold up the program with a regular expression."""
    layer, settings = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", {"unet.rank_pattern": {"(a|.|..)+o": 4}}
    tensors = {f"unet.{layer}.lora_A.weight": torch.ones(4, 16), f"unet.{layer}.lora_B.weight": torch.ones(16, 4)}
    save_file(tensors, tmp_path / FILE, {"lora_adapter_metadata": json.dumps(settings)})
    monkeypatch.setattr(patterns, "_STEPS", 100)
    with pytest.raises(tunerkit.errors.FileError, match=r"a pattern in the metadata cannot be used.*too many steps"):
        tunerkit.load(unet(), tmp_path)


def test_files_of_others_are_left_to_them(tmp_path: Path) -> None:
    """Neither Kohya's files, nor peft's, nor a model's weights, nor tunerkit's own are taken for diffusers'."""
    from tunerkit_diffusers import diffusers_reading, kohya_reading

    save_file({"lora_unet_conv_in.alpha": torch.ones(1)}, tmp_path / "kohya.safetensors")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    save_file({"conv_in.weight": torch.ones(1)}, tmp_path / "weights.safetensors")
    tunerkit.save(wrapped(unet()), tmp_path / "adapter.safetensors")
    assert not any(diffusers_reading.sniff(path) for path in (*tmp_path.iterdir(), tmp_path, tmp_path / "no\0ne"))
    assert [path.name for path in sorted(tmp_path.iterdir()) if kohya_reading.sniff(path)] == ["kohya.safetensors"]
    one_layer(tmp_path)
    assert diffusers_reading.sniff(tmp_path)
    assert diffusers_reading.sniff(tmp_path / FILE)
