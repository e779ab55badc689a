"""Seccomp filters: profiles as values, compiled to BPF, and loaded."""

from corral.kernel.seccomp.compiler import compile_profile
from corral.kernel.seccomp.load import Filter, load
from corral.kernel.seccomp.rules import Architecture, Compare, Condition, Profile, Rule

__all__ = ["Architecture", "Compare", "Condition", "Filter", "Profile", "Rule", "compile_profile", "load"]
