"""Settings of the network leaf; the section [network] of config.toml has the same names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """Where network keeps its things, and what it calls them in the kernel.

    Two engines on one host need different roots, states, bridges and nft tables, and subnets that do not overlap.
    """

    # Database; and `endpoints`, the files that containers see as /etc/hosts, /etc/resolv.conf and /etc/hostname.
    root: Path = Path("/var/lib/corral/network")
    # Run state: network namespaces are pinned in its directory `netns`.
    state: Path = Path("/run/corral")
    # Bridge of the default network; at most 15 characters.
    bridge: str = "corral0"
    # Subnet of the default network. Where it overlaps a route of the host, a whole pool is taken instead.
    subnet: str = "10.68.0.0/16"
    # New networks that name no subnet get the first free one of length pool_prefix out of these, in order.
    pools: Sequence[str] = ("10.69.0.0/16", "172.28.0.0/14", "192.168.160.0/19")
    pool_prefix: int = 24
    # Our table in the family `inet`. No other is ever touched, but for what `forward` says.
    nft_table: str = "corral"
    # Where iptables' chain FORWARD drops by its policy, as docker has it: "accept" adds one rule at its end, as long as
    # there are networks, that accepts what our own table has accepted and marked; "leave" adds nothing. FORWARD of ufw,
    # and firewalld, are always left alone: `network explain` says what to tell them.
    forward: str = "accept"
    # MTU of networks that name none; 0: that of the host's default route.
    mtu: int = 0
    # Where plugins of CNI are looked for, in order.
    cni_bin_dirs: Sequence[str] = ("/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni")
    # Where configurations of CNI networks are that the host has already, in order.
    cni_conf_dirs: Sequence[str] = ("/etc/cni/net.d",)
    # Where engines of this host tell one another the names of their CNI networks.
    cni_names: Path = Path("/var/lib/cni/corral")
    # Network namespaces kept ready.
    netns_pool_size: int = 8
    # The host's resolver configuration, and the one behind it where systemd-resolved listens on a loopback address.
    resolv_conf: Path = Path("/etc/resolv.conf")
    resolved_conf: Path = Path("/run/systemd/resolve/resolv.conf")
    # Name servers given to containers where the host names none that they could reach.
    fallback_dns: Sequence[str] = ("1.1.1.1", "8.8.8.8")
