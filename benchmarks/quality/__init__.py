"""What adapters are worth: accuracy of LoRA and AdaLoRA, ours and PEFT's, on real tasks that need no hub."""
