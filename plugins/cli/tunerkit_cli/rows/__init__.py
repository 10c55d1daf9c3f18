"""The rows of a data file: read, checked and split, before any model is loaded."""
