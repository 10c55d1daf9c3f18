"""diffusers' and Kohya's LoRA files for tunerkit: read and written."""

from tunerkit_diffusers.options import DiffusersOptions, KohyaOptions

__all__ = ["DiffusersOptions", "KohyaOptions"]
