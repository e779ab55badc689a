"""The tasks leaf: the processes of containers, each container behind one shim that outlives this service."""
