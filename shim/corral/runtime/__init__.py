"""`corral-oci`: the runtime core as a command, for whoever drives an OCI runtime: podman, docker, containerd, a person.

One process per command, and none that stays. What is known of a container is in its state directory (state.py), what it
is in the kernel.
"""
