"""Public keys, and what they verify. `cryptography` is loaded when the settings name a key, and nowhere else.

Source: cosign, specs/SIGNATURE_SPEC.md "Signature Schemes": ECDSA and RSA (PKCS #1 v1.5) over SHA-256, or Ed25519.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from corral.images.digest import Digest, algorithm_of, hex_of

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

MAX_KEY_BYTES = 64 << 10
LEAST_RSA_BITS = 2048
_BEGIN = b"-----BEGIN "


@dataclass(frozen=True, slots=True)
class PublicKey:
    """One that the settings name. `id` is the digest of the key itself, wherever it lies."""

    id: str
    path: Path
    _key: "EllipticCurvePublicKey | RSAPublicKey | Ed25519PublicKey"

    @property
    def needs_content(self) -> bool:
        """Whether it signs content itself; by one that signs the digest a signature is told before content is here."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        return isinstance(self._key, Ed25519PublicKey)

    def verifies(self, signature: bytes, digest: Digest, content: bytes | None = None) -> bool:
        """Whether this key has signed what has the digest. content: that itself, where `needs_content`."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
        from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
        from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
        from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
        from cryptography.hazmat.primitives.hashes import SHA256

        if algorithm_of(digest) != "sha256":
            return False
        hashed = bytes.fromhex(hex_of(digest))
        try:
            if isinstance(self._key, EllipticCurvePublicKey):
                self._key.verify(signature, hashed, ECDSA(Prehashed(SHA256())))
            elif isinstance(self._key, RSAPublicKey):
                self._key.verify(signature, hashed, PKCS1v15(), Prehashed(SHA256()))
            elif content is None or hashlib.sha256(content).digest() != hashed:
                return False
            else:
                self._key.verify(signature, content)
        except InvalidSignature:
            return False
        return True


def load_key(path: Path) -> PublicKey:
    """The key in a PEM file. Blocking. Raises ValueError, which names the file."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_BYTES + 1)
    except OSError as e:
        raise ValueError(f"cannot read the policy's key {path}: {e.strerror}") from e
    if data.count(_BEGIN) > 1 or len(data) > MAX_KEY_BYTES:
        raise ValueError(f"the policy's key {path} holds more than one: give each a file of its own")
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as e:
        raise ValueError(f"the policy's key {path} is no public key in PEM form") from e
    if not isinstance(key, EllipticCurvePublicKey | RSAPublicKey | Ed25519PublicKey):
        raise ValueError(f"the policy's key {path} is of a kind that nobody signs images with: ECDSA, RSA, Ed25519 are")
    if isinstance(key, RSAPublicKey) and key.key_size < LEAST_RSA_BITS:
        raise ValueError(
            f"the policy's key {path} has {key.key_size} bits, which is too few: RSA needs {LEAST_RSA_BITS}"
        )
    encoded = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return PublicKey(hashlib.sha256(encoded).hexdigest(), path, key)
