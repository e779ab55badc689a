"""Signatures of images as cosign makes them: keys and signatures by openssl, brought to a registry by plain requests.

Source: cosign, specs/SIGNATURE_SPEC.md.
"""

import base64
import json
import subprocess
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin

from support.images import digest
from support.registry import Registry, run

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
PAYLOAD = "application/vnd.dev.cosign.simplesigning.v1+json"
ARTIFACT = "application/vnd.dev.cosign.artifact.sig.v1+json"
ANNOTATION = "dev.cosignproject.cosign/signature"

_ALGORITHMS = {
    "ecdsa": ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
    "ecdsa-p384": ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"],
    "rsa": ["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
    "ed25519": ["-algorithm", "ED25519"],
    "rsa-short": ["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024"],
    "x25519": ["-algorithm", "X25519"],
}


@dataclass(frozen=True, slots=True)
class Key:
    """A pair of files."""

    private: Path
    public: Path
    algorithm: str

    @classmethod
    def make(cls, directory: Path, name: str, algorithm: str = "ecdsa") -> "Key":
        directory.mkdir(parents=True, exist_ok=True)
        made = cls(directory / f"{name}.key", directory / f"{name}.pub", algorithm)
        run(["openssl", "genpkey", *_ALGORITHMS[algorithm], "-out", made.private])
        run(["openssl", "pkey", "-in", made.private, "-pubout", "-out", made.public])
        return made

    def sign(self, payload: bytes) -> bytes:
        with tempfile.NamedTemporaryFile() as file:
            file.write(payload)
            file.flush()
            if self.algorithm == "ed25519":
                command = ["openssl", "pkeyutl", "-sign", "-rawin", "-inkey", str(self.private), "-in", file.name]
            else:
                command = ["openssl", "dgst", "-sha256", "-sign", str(self.private), file.name]
            return subprocess.run(command, capture_output=True, check=True).stdout


def payload(reference: str, image: str, **more: object) -> bytes:
    """What is signed: that `image`, a digest, is of the repository."""
    critical = {
        "identity": {"docker-reference": reference},
        "image": {"docker-manifest-digest": image},
        "type": "cosign container image signature",
    }
    return json.dumps({"critical": critical | more, "optional": None}).encode()


@dataclass(frozen=True, slots=True)
class Signed:
    """A payload, and whose signature it bears."""

    payload: bytes
    signature: bytes

    @classmethod
    def by(cls, key: Key, what: bytes) -> "Signed":
        return cls(what, key.sign(what))

    @property
    def layer(self) -> dict[str, object]:
        return {
            "mediaType": PAYLOAD,
            "digest": digest(self.payload),
            "size": len(self.payload),
            "annotations": {ANNOTATION: base64.b64encode(self.signature).decode()},
        }


def artifact(layers: Sequence[Mapping[str, object]], config: bytes = b"{}", **more: object) -> bytes:
    """The manifest that holds signatures."""
    kind = ARTIFACT if "subject" in more else "application/vnd.oci.image.config.v1+json"
    described = {"mediaType": kind, "digest": digest(config), "size": len(config)}
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described, "layers": list(layers), **more}
    return json.dumps(document).encode()


def tag_of(image: str) -> str:
    return f"{image.replace(':', '-')}.sig"


def put_blob(registry: Registry, name: str, data: bytes) -> None:
    headers, _ = registry.request("POST", f"{name}/blobs/uploads/", data=b"")
    location = urljoin(f"http://{registry.host}/", {k.lower(): v for k, v in headers.items()}["location"])
    url = f"{location}{'&' if '?' in location else '?'}digest={digest(data)}"
    request = urllib.request.Request(url, data, {"Content-Type": "application/octet-stream"}, method="PUT")
    urllib.request.urlopen(request, timeout=30).close()


def put_manifest(registry: Registry, name: str, tag: str, data: bytes, media_type: str = MANIFEST) -> str:
    registry.request("PUT", f"{name}/manifests/{tag}", {"Content-Type": media_type}, data)
    return digest(data)


def attach(registry: Registry, name: str, image: str, signatures: Sequence[Signed]) -> None:
    """Under the tag that cosign gives them."""
    for data in {b"{}", *(each.payload for each in signatures)}:
        put_blob(registry, name, data)
    put_manifest(registry, name, tag_of(image), artifact([each.layer for each in signatures]))


def refer(registry: Registry, name: str, image: str, size: int, signatures: Sequence[Signed]) -> None:
    """As OCI 1.1 referrers, each for itself; listed under a tag, as this registry has no API for it."""
    subject = {"mediaType": MANIFEST, "digest": image, "size": size}
    entries = []
    put_blob(registry, name, b"{}")
    for each in signatures:
        put_blob(registry, name, each.payload)
        data = artifact([each.layer], subject=subject)
        put_manifest(registry, name, digest(data), data)
        entries.append({"mediaType": MANIFEST, "digest": digest(data), "size": len(data), "artifactType": ARTIFACT})
    kind = "application/vnd.oci.image.index.v1+json"
    index = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": entries}).encode()
    put_manifest(registry, name, image.replace(":", "-"), index, kind)
