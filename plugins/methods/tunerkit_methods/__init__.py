"""Methods of fine-tuning for tunerkit, each one file and one plugin."""
