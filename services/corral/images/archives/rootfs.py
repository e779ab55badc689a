"""A plain root file system as an image of one layer."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime

from corral.images.archives.docker import Store, layer_type
from corral.images.archives.found import FoundImage
from corral.images.archives.intake import StoredFile
from corral.images.details import make_details
from corral.images.digest import Digest
from corral.images.model import (
    OCI_CONFIG,
    OCI_MANIFEST,
    Descriptor,
    Healthcheck,
    ImageConfig,
    Manifest,
    Platform,
    parse_config,
)
from corral.images.reference import Reference


def make_rootfs_image(
    name: Reference, layer: StoredFile, diff_id: Digest, config: ImageConfig, platform: Platform, store: Store
) -> FoundImage:
    """An image around one layer whose diff id was found by unpacking it."""
    made = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    config_file = store(dumped(config_document(config, platform, [diff_id], made)))
    descriptors = (
        Descriptor(OCI_CONFIG, config_file.digest, config_file.size_bytes),
        Descriptor(layer_type(layer.path), layer.digest, layer.size_bytes),
    )
    manifest = Manifest(OCI_MANIFEST, descriptors[0], descriptors[1:])
    manifest_file = store(dumped(manifest_document(manifest)))
    target = Descriptor(OCI_MANIFEST, manifest_file.digest, manifest_file.size_bytes)
    details = make_details(manifest, parse_config(config_file.path.read_bytes(), "config"), str(name))
    blobs = {file.digest: file for file in (config_file, layer, manifest_file)}
    edges = {(manifest_file.digest, descriptor.digest) for descriptor in descriptors}
    return FoundImage((name,), target, target, details, blobs, edges)


def dumped(document: Mapping[str, object]) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def manifest_document(manifest: Manifest) -> dict[str, object]:
    def described(descriptor: Descriptor) -> dict[str, object]:
        return {"mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size_bytes}

    return {
        "schemaVersion": 2,
        "mediaType": manifest.media_type,
        "config": described(manifest.config),
        "layers": [described(layer) for layer in manifest.layers],
    }


def config_document(config: ImageConfig, platform: Platform, diff_ids: list[Digest], created: str) -> dict[str, object]:
    """Source: OCI image-spec config.md."""
    document: dict[str, object] = {
        "created": created,
        "architecture": platform.architecture,
        "os": platform.os or "linux",
        "config": config_object(config),
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created": created, "created_by": "corral image import"}],
    }
    if platform.variant:
        document["variant"] = platform.variant
    return document


def config_object(config: ImageConfig) -> dict[str, object]:
    """Without what is empty, as other writers have it."""
    fields: dict[str, object] = {
        "User": config.user,
        "ExposedPorts": {port: {} for port in config.exposed_ports},
        "Env": list(config.env),
        "Entrypoint": list(config.entrypoint),
        "Cmd": list(config.cmd),
        "Volumes": {path: {} for path in config.volumes},
        "WorkingDir": config.working_dir,
        "Labels": dict(config.labels),
        "StopSignal": config.stop_signal,
        "Healthcheck": _healthcheck_object(config.healthcheck) if config.healthcheck else None,
    }
    return {key: value for key, value in fields.items() if value}


def _healthcheck_object(check: Healthcheck) -> dict[str, object]:
    fields: dict[str, object] = {
        "Test": list(check.test),
        "Interval": check.interval_ns,
        "Timeout": check.timeout_ns,
        "StartPeriod": check.start_period_ns,
        "StartInterval": check.start_interval_ns,
        "Retries": check.retries,
    }
    return {key: value for key, value in fields.items() if value}
