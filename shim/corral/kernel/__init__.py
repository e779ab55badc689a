"""The only place that calls libc: mounts, namespaces, cgroups, processes, capabilities, seccomp. Standard library only."""
