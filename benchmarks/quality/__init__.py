"""Accuracy of LoRA and AdaLoRA, ours and PEFT's, on real tasks whose data and models come from package registries."""
