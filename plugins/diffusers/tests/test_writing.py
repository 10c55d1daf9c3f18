"""What tunerkit writes, diffusers loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tunerkit

pytest.importorskip("diffusers", reason="it loads the files")
pytest.importorskip("peft", reason="diffusers loads adapters with it")
from transformers import CLIPTextModel, CLIPTextModelWithProjection  # after the skips

from plugins.diffusers.tests.pipelines import (
    TOLERANCE,
    error,
    load_as_diffusers,
    output,
    sdxl_unet,
    text_encoder,
    transformer,
    unet,
    wrapped,
)

FORMS: list[tuple[str, dict[str, Any]]] = [("diffusers", {}), ("diffusers", {"form": "compact"}), ("kohya", {})]
UNEQUAL: dict[str, Any] = {"rank": 4, "rank_pattern": {"conv1": 2, "to_q": 0, "to_k": 7, "proj_in": 1}}


def check(adapted: nn.Module, build: Callable[[], nn.Module], path: Path, format: str, **options: Any) -> None:
    """Export, load with diffusers and with tunerkit, and compare the outputs with the adapted and the bare model's."""
    expected = output(adapted)
    tunerkit.export(adapted, path, format=format, **options)
    assert error(output(build()), expected) > 0.05, "the adapter changes too little to test anything"
    assert error(output(load_as_diffusers(build(), path)), expected) <= TOLERANCE
    assert error(output(tunerkit.load(build(), path)), expected) <= TOLERANCE


@pytest.mark.parametrize(("format", "options"), FORMS)
@pytest.mark.parametrize("build", [unet, sdxl_unet])
def test_a_pipeline_gives_our_output(
    build: Callable[[], nn.Module], format: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """All linear layers and convolutions are adapted, with ranks from 0 to 7."""
    check(wrapped(build(), **UNEQUAL), build, tmp_path / "out", format, **options)


def test_adalora_leaves_too(tmp_path: Path) -> None:
    """A pruned AdaLoRA, with λ and masks, gives our output in diffusers, in every form."""
    pytest.importorskip("tunerkit_adalora", reason="the adapter is AdaLoRA's")
    model = wrapped(unet(), "adalora", target_rank=2, init_rank=4, t_init=0, t_final=1, delta_t=1)
    optimizer = torch.optim.AdamW(tunerkit.param_groups(model, lr=1e-3))
    tunerkit.attach(model, optimizer, total_steps=6)
    draw = torch.Generator().manual_seed(1)
    noise, text = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 5, 8, generator=draw)
    for _ in range(6):
        model(noise, torch.tensor([3]), text).sample.square().mean().backward()
        optimizer.step()
    ranks = tunerkit.tuner(model).ranks().values()
    assert 0 in ranks
    assert max(ranks) == 4
    for format, options in FORMS:
        check(model.eval(), unet, tmp_path / f"{format}{len(options)}", format, **options)


@pytest.mark.parametrize("form", ["uniform", "compact"])
def test_a_transformer_gives_our_output(form: str, tmp_path: Path) -> None:
    """Its names begin with ``transformer``."""
    ranks: dict[str, Any] = {"rank": 4, "rank_pattern": {"to_q": 0, "to_k": 7, "pos_embed.proj": 1}}
    check(wrapped(transformer(), **ranks), transformer, tmp_path / "out", "diffusers", form=form)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("fc1",), ("k_proj", "fc2"), ("out_proj", "q_proj")])
@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_text_encoder_gives_our_output(
    format: str, kind: type[nn.Module], targets: tuple[str, ...], tmp_path: Path
) -> None:
    """Attention without its output projection too, which diffusers alone would leave out under Kohya's names."""
    adapted = wrapped(text_encoder(kind), targets=targets, rank_pattern={"re:.*layers.0.*": 2})
    check(adapted, lambda: text_encoder(kind), tmp_path / "out", format, component="text_encoder")


def test_a_unet_loads_the_file_alone(tmp_path: Path) -> None:
    """``unet.load_lora_adapter`` takes the file's path, with the prefix ``unet``."""
    adapted, bare = wrapped(unet(), rank=3), unet()
    file = tunerkit.export(adapted, tmp_path / "one.safetensors", format="diffusers")
    bare.load_lora_adapter(str(file), prefix="unet", use_safetensors=True)  # type: ignore[operator]
    assert error(output(bare), output(adapted)) <= TOLERANCE


def test_kohyas_files_have_one_rank_which_is_alpha(tmp_path: Path) -> None:
    """Whatever the ranks are; the second embedding of XL has the name under which diffusers finds it."""
    tunerkit.export(wrapped(sdxl_unet(), **UNEQUAL), tmp_path / "out", format="kohya")
    tensors = load_file(tmp_path / "out" / "lora.safetensors")
    assert {tensor.item() for name, tensor in tensors.items() if name.endswith(".alpha")} == {7.0}
    assert all(tensor.shape[0] == 7 for name, tensor in tensors.items() if name.endswith("lora_down.weight"))
    assert "lora_unet_label_emb_0_0.alpha" in tensors
    assert "lora_unet_down_blocks_0_downsamplers_0_conv.lora_up.weight" in tensors


def test_nothing_but_rank_zero_is_still_an_adapter(tmp_path: Path) -> None:
    """Each form has at least one module, of zeros, and loads."""
    for format, options in FORMS:
        path = tmp_path / f"{format}{len(options)}"
        with pytest.warns(tunerkit.TunerkitWarning, match="untrained"):
            tunerkit.export(wrapped(unet(), rank_pattern={"*": 0}), path, format=format, **options)
        assert error(output(load_as_diffusers(unet(), path)), output(unet())) == 0


def test_an_export_of_an_import_is_the_same_product(tmp_path: Path) -> None:
    """Under either name, the products are bit for bit those of the first file."""
    for format in ("diffusers", "kohya"):
        tunerkit.export(wrapped(unet(), **UNEQUAL), tmp_path / format, format=format)
        again = tunerkit.load(unet(), tmp_path / format)
        tunerkit.export(again, tmp_path / f"{format}2", format=format)
        (one,), (two,) = ((tmp_path / name).iterdir() for name in (format, f"{format}2"))
        first, second = load_file(one), load_file(two)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "copies": (unet, {"targets": ("conv_in",), "train_modules": ("conv_out",)}, "trained in full.*conv_out"),
    "biases": (unet, {"targets": ("conv_in",), "bias": "adapters"}, "trained biases.*conv_in"),
    "an embedding": (
        lambda: nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)),
        {"targets": ("0", "1")},
        "'0': it is a Embedding.*exclude",
    ),
    "attention's own projection": (
        lambda: nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(4, 4)),
        {"targets": ("0", "0.out_proj")},
        "'0': it is a MultiheadAttention",
    ),
    "attention's output": (
        lambda: nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(4, 4)),
        {"targets": ("0.out_proj",)},
        "'0.out_proj': it is the output projection",
    ),
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), {"targets": ("0",)}, "2 groups"),
    "dilation": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2)), {"targets": ("0",)}, "dilation"),
    "padding": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
        {"targets": ("0",)},
        "padding mode 'circular'",
    ),
}


@pytest.mark.parametrize(("build", "config", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_files_cannot_hold_is_refused_by_name(
    build: Callable[[], nn.Module], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """And nothing is written."""
    for format in ("diffusers", "kohya"):
        if format == "kohya" and build is not unet:
            continue  # it refuses the names first
        with pytest.raises(tunerkit.errors.FileError, match=message):
            tunerkit.export(wrapped(build(), **config), tmp_path / "out", format=format, component="unet")
    assert not (tmp_path / "out").exists()


def test_the_part_of_the_pipeline_must_be_known(tmp_path: Path) -> None:
    """An unknown class needs ``component``; one with two meanings says which; a wrong one lists what is allowed."""
    model = wrapped(nn.Sequential(nn.Linear(4, 4)), rank=1)
    with pytest.raises(
        tunerkit.errors.ConfigError, match=r"part of a pipeline this Sequential is; pass component='unet' or"
    ):
        tunerkit.export(model, tmp_path / "out", format="diffusers")
    both = wrapped(text_encoder(CLIPTextModelWithProjection), targets=("q_proj",))
    with pytest.raises(tunerkit.errors.ConfigError, match="component='text_encoder' or 'text_encoder_2'"):
        tunerkit.export(both, tmp_path / "out", format="kohya")
    with pytest.raises(tunerkit.errors.ConfigError, match="component"):
        tunerkit.export(model, tmp_path / "out", format="kohya", component="vae")
    tunerkit.export(both, tmp_path / "out", format="kohya", component="text_encoder_2")
    assert all(name.startswith("lora_te2_") for name in load_file(tmp_path / "out" / "lora.safetensors"))


def test_names_that_diffusers_would_not_find_are_refused(tmp_path: Path) -> None:
    """Transformers and unknown layers under Kohya's names, heads of text encoders, ranks per module there."""
    with pytest.raises(tunerkit.errors.FileError, match=r"SD3Transformer2DModel.*format='diffusers'"):
        tunerkit.export(wrapped(transformer(), rank=1), tmp_path / "out", format="kohya")
    odd = wrapped(nn.Sequential(nn.Linear(4, 4)), rank=1)
    with pytest.raises(tunerkit.errors.FileError, match=r"no name for '0'.*exclude=\('0',\)"):
        tunerkit.export(odd, tmp_path / "out", format="kohya", component="unet")
    head = wrapped(text_encoder(CLIPTextModelWithProjection), targets=("text_projection", "q_proj"))
    with pytest.raises(tunerkit.errors.FileError, match=r"'text_projection'.*q_proj"):
        tunerkit.export(head, tmp_path / "out", format="diffusers", component="text_encoder")
    encoder = wrapped(text_encoder(), targets=("q_proj",))
    with pytest.raises(tunerkit.errors.ConfigError, match="use 'uniform'"):
        tunerkit.export(encoder, tmp_path / "out", format="diffusers", form="compact")
    assert not (tmp_path / "out").exists()
