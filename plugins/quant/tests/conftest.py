"""The fixture `toys`: toy methods, and a small model with every kind of layer."""

from tests.support.toys import saved as saved, toys as toys
