"""A small D-Bus client: enough to ask a service for something and to wait for what it says of it.

with Connection.to_bus("unix:path=/run/dbus/system_bus_socket") as bus:
    (names,) = bus.call(Target("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus"), "ListNames")

    marshalling.py  values and messages as bytes
    connection.py   the socket: authentication, calls, signals
    text.py         values as a person writes them

No file descriptors are passed, and nothing is offered to others. Source: D-Bus Specification, version 0.43.
"""
