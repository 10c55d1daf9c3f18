"""What surrounds the pages' blocks marked ``py`` when a test runs them: they need a library or a process group."""

from collections.abc import Mapping

import attrs

# One process that torchrun might have started.
_ONE_OF_ONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@attrs.frozen
class Setting:
    """How a block runs.

    Attributes:
        needs: Modules without which it is skipped.
        after_the_page: Whether the page's ``python`` blocks above it run first.
        before: Lines that make what the block takes as given.
        after: Lines that check what it left.
        environment: Variables of its process.
    """

    needs: tuple[str, ...] = ()
    after_the_page: bool = False
    before: str = ""
    after: str = ""
    environment: Mapping[str, str] = attrs.Factory(dict)


# The setting of each block, by a line that no other block has: pages are renamed more often than examples.
SETTINGS = {
    'packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")': Setting(
        needs=("bitsandbytes", "tunerkit_quant", "trl", "datasets", "tunerkit_gguf", "tunerkit_peft"),
        after_the_page=True,
        after="assert tunerkit.tuner(model).steps == 20",
    ),
    "tunerkit.attach(model, optimizer, total_steps=len(batches))  # in every process; then train as above": Setting(
        needs=("tunerkit_distributed", "datasets"),
        after_the_page=True,
        before=f"import os\nos.environ.update({_ONE_OF_ONE})",  # not before: the page's Trainer would join the group
    ),
}
