"""What the tests of core and of all plugins share: the machine, and where garbage is looked for."""

import gc

from tests.support import machines

machines.believe_()


def pytest_collection_finish() -> None:
    """Take what was imported out of each garbage collection.

    A Trainer collects all garbage at the end of training. Among the objects of all imported libraries, that takes
    longer than the training of a tiny model.
    """
    gc.collect()
    gc.freeze()
