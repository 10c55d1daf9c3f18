"""LoRA for tunerkit (Hu et al., ICLR 2022, arXiv 2106.09685)."""

from tunerkit_lora.config import LoraConfig

__all__ = ["LoraConfig"]
