"""The fixture `toys`: toy methods, and a small model with every kind of layer."""

from tests.support.toys import toys as toys
