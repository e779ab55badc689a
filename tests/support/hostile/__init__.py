"""The corpus of hostile images: each a name, what it is made of, and what must come of it.

    CORPUS    layers, which the tests put into an archive of every form, into a registry, and on every kind of driver
    ARCHIVES  archives whose lie is in the archive itself: in its table, its index, its members, or its end
    PULLED    images whose lie is in their documents, as a registry takes them

An image is refused, with one sentence in which certain words stand, or contained: it comes, and changes nothing but
itself. Either way nothing outside of the images' own directory changes, and nothing half-made stays.
"""

from support.hostile.attributes import ATTRIBUTES
from support.hostile.case import ArchiveCase, Case, DocumentCase
from support.hostile.documents import DOCUMENTS
from support.hostile.members import ARCHIVES
from support.hostile.paths import PATHS
from support.hostile.sizes import SIZES
from support.hostile.streams import STREAMS
from support.hostile.whiteouts import WHITEOUTS

CORPUS: tuple[Case, ...] = (*PATHS, *WHITEOUTS, *SIZES, *ATTRIBUTES, *STREAMS)
PULLED: tuple[DocumentCase, ...] = DOCUMENTS

__all__ = ["ARCHIVES", "CORPUS", "PULLED", "ArchiveCase", "Case", "DocumentCase"]
