"""Step callbacks: drive the methods from the optimizer's own steps."""

from tunerkit.steps.attachment import detach, hold, is_attached, last_gradient, report_undriven, unwatch_, watch_
from tunerkit.steps.checks import engine_for
from tunerkit.steps.driver import drive
from tunerkit.steps.resizing import Cut, Growth, grow_, optimizer_of, resize_obstacle, shrink_
