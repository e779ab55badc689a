"""A stand-in for types: those that the core names."""

import sys

from corral.runtime.standins import standard

ModuleType = type(sys)
NoneType = type(None)
UnionType = type(int | str)

__getattr__ = standard("types")
