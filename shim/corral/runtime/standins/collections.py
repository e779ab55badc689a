"""A stand-in for collections, which is mostly loaded for the sake of collections.abc."""

import sys

from corral.runtime.standins import collections_abc as abc
from corral.runtime.standins import standard

sys.modules.setdefault("collections.abc", abc)

__getattr__ = standard("collections")
