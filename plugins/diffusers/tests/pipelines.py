"""Small random parts of diffusion pipelines, and how diffusers loads a LoRA into them."""

from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import tunerkit

TOLERANCE = 1e-5  # of the largest output


def unet() -> nn.Module:
    """Stable Diffusion's layers: convolutions (3×3, 1×1, strided), attention and feed-forward."""
    torch.manual_seed(0)
    model: nn.Module = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    return model.eval()


def sdxl_unet() -> nn.Module:
    """Stable Diffusion XL's blocks, with linear projections and a second embedding."""
    torch.manual_seed(0)
    model: nn.Module = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(4, 4, 8),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )
    return model.eval()


def transformer() -> nn.Module:
    """Stable Diffusion 3's transformer."""
    torch.manual_seed(0)
    model: nn.Module = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )
    return model.eval()


def text_encoder(kind: type[nn.Module] = CLIPTextModel) -> nn.Module:
    """A CLIP text encoder with two layers."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=8,
        bos_token_id=1,
        eos_token_id=2,
    )
    return kind(config).eval()


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    """The output of any of these models for the same random input."""
    draw = torch.Generator().manual_seed(1)
    noise, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 5, 8, generator=draw)
    pooled, steps = torch.randn(2, 8, generator=draw), torch.tensor([3, 40])
    ids = torch.randint(3, 64, (2, 8), generator=draw)
    if isinstance(model, UNet2DConditionModel):
        more = {"text_embeds": pooled, "time_ids": torch.ones(2, 6)}  # a plain UNet ignores it
        found = model(noise, steps, text, added_cond_kwargs=more).sample
    elif isinstance(model, SD3Transformer2DModel):
        found = model(noise, text, pooled, steps).sample
    else:
        found = model(ids)[0]
    assert isinstance(found, Tensor)
    return found


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value expected."""
    return float((found - expected).abs().max() / expected.abs().max())


def layers(model: nn.Module) -> tuple[str, ...]:
    """The paths of all linear layers and convolutions."""
    return tuple(path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))


@torch.no_grad()
def wrapped(model: nn.Module, method: str = "lora", **config: object) -> nn.Module:
    """The model with an adapter of random weights at all layers, or at those of the config."""
    tunerkit.wrap(model, method, {"targets": layers(model), **config})
    draw = torch.Generator().manual_seed(2)
    for parameter in tunerkit.tuner(model).parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model


def pipeline(*, denoiser: nn.Module | None = None, encoder: nn.Module | None = None) -> StableDiffusionPipeline:
    """A pipeline of Stable Diffusion with nothing but these parts."""
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder,
        tokenizer=None,
        unet=denoiser,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load_as_diffusers(model: nn.Module, path: Path) -> nn.Module:
    """Load a file into a part of a pipeline, as ``load_lora_weights`` does, and return the part."""
    if isinstance(model, SD3Transformer2DModel):
        model.load_lora_adapter(str(path), use_safetensors=True)
    elif isinstance(model, UNet2DConditionModel) and model.config.addition_embed_type is None:
        pipeline(denoiser=model).load_lora_weights(str(path))
    elif isinstance(model, UNet2DConditionModel):
        loader = StableDiffusionXLPipeline
        tensors, alphas, settings = loader.lora_state_dict(
            str(path), unet_config=model.config, return_lora_metadata=True
        )
        loader.load_lora_into_unet(tensors, alphas, model, metadata=settings)
    else:
        loader = StableDiffusionPipeline
        tensors, alphas, settings = loader.lora_state_dict(str(path), return_lora_metadata=True)
        loader.load_lora_into_text_encoder(tensors, alphas, model, metadata=settings)
    return model
