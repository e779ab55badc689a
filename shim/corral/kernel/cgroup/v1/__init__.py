"""Controllers of cgroup v1, one file each."""
