"""The proxy of [::1]: a process beside the network service, which it outlives. The standard library only."""
