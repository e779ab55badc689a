"""Which kernel parameters belong to a container."""

import pytest

from corral.kernel.namespaces import Kind
from corral.oci.sysctl import check_sysctl, sysctl_path

ALL = (Kind.NETWORK, Kind.IPC, Kind.UTS)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("net.ipv4.ip_forward", "net/ipv4/ip_forward"),
        ("net/ipv4/ip_forward", "net/ipv4/ip_forward"),
        ("net.ipv4.conf.eth0/100.forwarding", "net/ipv4/conf/eth0.100/forwarding"),
        ("net/ipv4/conf/eth0.100/forwarding", "net/ipv4/conf/eth0.100/forwarding"),
    ],
)
def test_the_first_separator_tells_how_a_name_is_written(name, path):
    assert sysctl_path(name) == path


@pytest.mark.parametrize("name", ["net/../kernel/core_pattern", "net..ipv4", "/net/ipv4", "", "net/./x", "net/ipv4/"])
def test_names_that_would_lead_elsewhere_are_refused(name):
    with pytest.raises(ValueError, match="not the name of a parameter"):
        sysctl_path(name)


@pytest.mark.parametrize(
    "name", ["kernel.core_pattern", "vm.overcommit_memory", "kernel.hostname", "fs.file-max", "net"]
)
def test_what_belongs_to_the_host_is_refused(name):
    with pytest.raises(ValueError, match="belongs to the host"):
        check_sysctl({name: "1"}, ALL)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("net.core.somaxconn", Kind.NETWORK),
        ("kernel.shmmax", Kind.IPC),
        ("fs.mqueue.msg_max", Kind.IPC),
        ("kernel.domainname", Kind.UTS),
    ],
)
def test_a_parameter_needs_a_namespace_of_the_containers_own(name, kind):
    assert check_sysctl({name: "1"}, [kind]) == {sysctl_path(name): "1"}
    with pytest.raises(ValueError, match=f"shares the host's {kind.value} namespace"):
        check_sysctl({name: "1"}, set(ALL) - {kind})
