"""What every command is given."""

from corral.runtime.log import Log


class Context:
    """The global flags, understood."""

    __slots__ = ("log", "root")

    def __init__(self, root: str, log: Log) -> None:
        self.root, self.log = root, log
