"""The cgroups leaf: a cgroup per container, its limits, counters and OOM kills. Thin over corral.kernel.cgroup."""
