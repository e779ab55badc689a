"""Seccomp filters: compiled from a table of rules to BPF, and loaded."""

from corral.kernel.seccomp.load import Filter, load

__all__ = ["Filter", "load"]
