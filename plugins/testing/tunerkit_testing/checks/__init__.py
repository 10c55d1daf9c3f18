"""The checks of a method, each a function whose docstring is its law: one file for each topic."""
