# For type checkers, which see a few names more than the module has.
from .. import *  # noqa: F403 - each name once, there
from .. import hookimpl as hookimpl
from ..patterns import *  # noqa: F403
