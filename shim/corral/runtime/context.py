"""What every command is given."""

from corral.kernel.privilege import is_hosts_root
from corral.runtime.log import Log


class Context:
    """The global flags, understood."""

    __slots__ = ("_rootless", "log", "named", "root", "systemd", "with_cgroups")

    def __init__(
        self,
        root: str,
        log: Log,
        *,
        rootless: bool | None = None,
        with_cgroups: bool = True,
        systemd: bool = False,
        named: bool = False,
    ) -> None:
        self.root, self.log = root, log
        self.named = named
        """The root is one that was asked for."""
        self.systemd = systemd
        """It is systemd that makes the cgroups of new containers; an older one knows who made its."""
        self._rootless = rootless
        self.with_cgroups = with_cgroups
        """Containers get a cgroup."""

    @property
    def rootless(self) -> bool:
        """A cgroup that may not be made is done without, as far as nothing depends on it. As --rootless of runc."""
        return not is_hosts_root() if self._rootless is None else self._rootless
