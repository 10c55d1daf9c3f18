"""The fixtures of core's tests: toy methods and a model with every kind of layer, a file of it, and a process group."""

from tests.support.toys import group_of_one as group_of_one, saved as saved, toys as toys
