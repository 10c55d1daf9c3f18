"""Recipes: what ``tunerkit train`` is to do, as a file. Nothing here imports torch or transformers."""
