"""The engine: a composer of containers.

It calls images, network, cgroups and tasks in order, undoes on failure, and owns the container records, the volumes and
the merged journal.
"""
