"""The fixtures `toys`, toy methods and a small model with every kind of layer, and `saved`, a file of it."""

from tests.support.toys import saved as saved, toys as toys
