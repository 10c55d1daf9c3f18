"""Step callbacks: drive the methods from the optimizer's own steps."""

from tunerkit.steps.driver import drive
from tunerkit.steps.engines import engine_for
from tunerkit.steps.links import detach, hold, is_attached, optimizer_of
from tunerkit.steps.resizing import Cut, Growth, grow_, resize_obstacle, shrink_
from tunerkit.steps.undriven import watch_optimizers
