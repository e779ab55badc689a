"""Cgroups that systemd makes: a container is a scope unit, whose cgroup the driver beside then uses as any other.

    manager.py      starting, changing and stopping units
    driver.py       the driver for an engine, of scopes and slices
    scopes.py       what a container's scope is made with and told
    properties.py   limits as unit properties, so that systemd keeps to them when it writes a cgroup's files again
    names.py        where the cgroup of a unit is

Source: systemd.scope(5), systemd.resource-control(5), org.freedesktop.systemd1(5), systemd "Control Group APIs and
Delegation".
"""
