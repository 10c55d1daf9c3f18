"""AdaLoRA for tunerkit (Zhang et al., ICLR 2023, arXiv 2303.10512)."""

from tunerkit_adalora.config import AdaLoraConfig

__all__ = ["AdaLoraConfig"]
