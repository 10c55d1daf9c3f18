"""Step callbacks: drive the methods from the optimizer's own steps."""

from tunerkit.steps.attachment import detach, engine_for, hold, is_attached, report_undriven, unwatch_, watch_
from tunerkit.steps.driver import drive
from tunerkit.steps.resizing import Cut, Growth, grow_, optimizer_of, resize_obstacle, shrink_
