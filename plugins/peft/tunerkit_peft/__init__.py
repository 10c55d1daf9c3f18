"""PEFT's LoRA and AdaLoRA folders for tunerkit: read and written, for serving and for moving."""
