"""Mixtures of experts for tunerkit: adapters on the stacked weights of all experts of a block."""

from tunerkit_experts.layouts import Layout, describe
from tunerkit_experts.ranks import ranks
from tunerkit_experts.routes import Route

__all__ = ["Layout", "Route", "describe", "ranks"]
