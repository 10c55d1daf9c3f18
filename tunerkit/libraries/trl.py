"""TRL's trainers, recognised by name: nothing here imports TRL."""

_PACKAGE = "trl"


def is_trl_trainer(trainer: object) -> bool:
    """Whether the class of ``trainer`` is one of TRL's, or derives from one."""
    return any(cls.__module__.partition(".")[0] == _PACKAGE for cls in type(trainer).__mro__)
