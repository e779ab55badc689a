"""Everything that asks something of the Linux kernel: the only place of corral that calls libc."""
