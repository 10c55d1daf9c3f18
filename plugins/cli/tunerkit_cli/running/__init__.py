"""A training run: data, model, trainer, evaluation, and the folder that it leaves."""
