"""Controllers of cgroup v2, one file each."""
