"""Whom a connection trusts, and what it shows."""

import ssl

from corral.images.registry.endpoints import TlsFiles
from corral.rpc.errors import FailedPrecondition


def make_context(files: TlsFiles) -> ssl.SSLContext:
    """The system's CAs and those of the files. Blocking. Raises FailedPrecondition, naming the file."""
    context = ssl.create_default_context()
    # Some Pythons refuse a CA that lacks extensions of RFC 5280, as those that people make for themselves do.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if files.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    for ca in files.ca:
        try:
            context.load_verify_locations(ca)
        except (OSError, ssl.SSLError) as e:
            raise _unusable(ca, "a CA certificate", e) from e
    for certificate, key in files.client:
        try:
            context.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as e:
            raise _unusable(certificate, "a client certificate with its key", e) from e
    return context


def _unusable(path: object, what: str, e: OSError) -> FailedPrecondition:
    why = e.strerror if not isinstance(e, ssl.SSLError) and e.strerror else "it is none, in PEM form"
    return FailedPrecondition(f"cannot use {path} as {what}: {why}", reason="BAD_CERTIFICATE")
