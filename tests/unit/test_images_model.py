"""Manifests and configs of unknown origin: what is known is read, typed; what is wrong is refused, by its place."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.images import model
from corral.images.details import make_details
from corral.images.digest import chain_ids, digest_of
from corral.images.model import (
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Index,
    Manifest,
    parse_config,
    parse_manifest_or_index,
)
from corral.rpc.errors import InvalidArgument

DIGEST = "sha256:" + "12" * 32
OTHER = "sha256:" + "34" * 32


def descriptor(media_type: str, digest: str = DIGEST, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": 10, **more}


def manifest(**changes: Any) -> dict[str, Any]:
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(OCI_CONFIG),
        "layers": [descriptor(OCI_LAYER, OTHER)],
    }
    return {key: value for key, value in (document | changes).items() if value is not None}


def config(**changes: Any) -> dict[str, Any]:
    document = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [OTHER]}}
    return document | changes


def parsed(document: object, media_type: str = "") -> Manifest | Index:
    return parse_manifest_or_index(json.dumps(document).encode(), "manifest", media_type=media_type)


def read_config(document: object) -> model.Config:
    return parse_config(json.dumps(document).encode(), "config")


def test_a_manifest_is_read() -> None:
    found = parsed(manifest())
    assert isinstance(found, Manifest)
    assert found.config.digest == DIGEST
    assert [layer.digest for layer in found.layers] == [OTHER]


def test_an_index_is_read_with_platforms() -> None:
    entry = descriptor(OCI_MANIFEST, platform={"os": "linux", "architecture": "arm64", "variant": "v8"})
    found = parsed({"schemaVersion": 2, "manifests": [entry]})
    assert isinstance(found, Index)
    assert found.media_type == OCI_INDEX
    assert str(found.manifests[0].platform) == "linux/arm64/v8"


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (manifest(schemaVersion=1), "schema 1 is not taken any more"),
        (manifest(schemaVersion=None), "schemaVersion is not 2: it is no manifest"),
        (manifest(manifests=[descriptor(OCI_MANIFEST)]), "both an index and a manifest"),
        ({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": 3}, "manifests is not a list"),
        (manifest(config=None), "config is missing"),
        (manifest(layers={}), "layers is not a list"),
        (manifest(layers=[1]), "layers[0] is not an object"),
        (manifest(layers=[descriptor(OCI_LAYER)] * 501), "at most 500"),
        (manifest(config=descriptor(OCI_CONFIG, "sha256:zz")), "64 hex digits"),
        (manifest(config=descriptor(OCI_CONFIG, "sha512:" + "0" * 64)), "64 hex digits"),
        (manifest(config=descriptor(OCI_CONFIG, "md5:" + "0" * 32)), "64 hex digits"),
        (manifest(config=descriptor(OCI_CONFIG, "../../etc/passwd")), "64 hex digits"),
        (manifest(config={**descriptor(OCI_CONFIG), "size": -1}), "size is not between"),
        (manifest(config={**descriptor(OCI_CONFIG), "size": "10"}), "size is not a whole number"),
        (manifest(config={**descriptor(OCI_CONFIG), "size": True}), "size is not a whole number"),
        (manifest(mediaType="text/plain"), "is not an image's"),
        ([], "is not a JSON object"),
    ],
)
def test_a_bad_manifest_is_refused_by_its_place(document: object, why: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parsed(document)
    assert why in caught.value.message
    assert "\n" not in caught.value.message


def test_a_descriptor_and_its_manifest_must_agree_on_the_type() -> None:
    """CVE-2021-41190: the same bytes must not be a manifest for one reader and an index for another."""
    with pytest.raises(InvalidArgument, match="its descriptor says"):
        parsed(manifest(), DOCKER_MANIFEST)


def test_json_that_is_too_deep_or_too_large_or_none_is_refused() -> None:
    for data, why in (
        (b"[" * 200_000, "nested|not JSON"),
        (b" " * (5 << 20), "at most"),
        (b"\xff\xfe{}", "not JSON"),
        (b"{", "not JSON"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested"),
    ):
        with pytest.raises(InvalidArgument, match=why):
            parse_manifest_or_index(data, "manifest")


def test_the_part_of_a_config_that_reaches_a_container_is_read() -> None:
    inner = {
        "User": "app:staff",
        "Env": ["A=1", "B=2"],
        "Entrypoint": ["/entry"],
        "Cmd": "one word",
        "WorkingDir": "/w",
        "Volumes": {"/data": {}},
        "ExposedPorts": {"80/tcp": {}},
        "StopSignal": "SIGINT",
        "Labels": {"k": "v"},
        "Healthcheck": {"Test": ["CMD", "x"], "Interval": 10**9, "Retries": 3},
        "Hostname": "ignored",
    }
    found = read_config(config(config=inner, created="2024-05-06T07:08:09.123456789Z")).config
    assert found.user == "app:staff"
    assert found.env == ("A=1", "B=2")
    assert found.entrypoint == ("/entry",)
    assert found.cmd == ("one word",)
    assert found.volumes == ("/data",)
    assert found.exposed_ports == ("80/tcp",)
    assert found.stop_signal == "SIGINT"
    assert found.healthcheck is not None
    assert found.healthcheck.retries == 3


def test_null_means_absent_as_go_writes_it() -> None:
    found = read_config(config(config={"Env": None, "Cmd": None, "Labels": None, "User": None}, history=None))
    assert found.config == model.ImageConfig()


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (config(rootfs={"diff_ids": ["x"]}), "64 hex digits"),
        (config(rootfs={"diff_ids": [OTHER] * 501}), "at most 500"),
        (config(config={"Env": "A=1"}), "Env is not a list"),
        (config(config={"Env": [1]}), "Env is not a list of strings"),
        (config(config={"User": 0}), "User is not a string"),
        (config(config={"Labels": {"a": 1}}), "Labels.a is not a string"),
        (config(config={"Healthcheck": {"Retries": -1}}), "Retries is not between"),
        (config(config=[]), "config is not an object"),
    ],
)
def test_a_bad_config_is_refused_by_its_place(document: object, why: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_config(document)
    assert why in caught.value.message


def test_a_config_without_a_root_file_system_is_one_of_no_layers() -> None:
    assert read_config({}).diff_ids == read_config(config(rootfs=None)).diff_ids == ()


def test_a_senseless_time_is_no_time() -> None:
    assert read_config(config(created="yesterday")).created is None


def test_manifest_and_config_must_tell_of_the_same_layers() -> None:
    found = parsed(manifest(layers=[]))
    assert isinstance(found, Manifest)
    with pytest.raises(InvalidArgument, match="0 layers, but its config tells of 1"):
        make_details(found, read_config(config()), "image")


def test_an_artifact_is_not_an_image() -> None:
    found = parsed(manifest(config=descriptor("application/vnd.cncf.helm.config.v1+json")))
    assert isinstance(found, Manifest)
    with pytest.raises(InvalidArgument, match="not a container image"):
        make_details(found, read_config(config()), "image")


def test_chain_ids_are_those_of_the_specification() -> None:
    one, two = digest_of(b"1"), digest_of(b"2")
    assert chain_ids(()) == ()
    assert chain_ids((one, two)) == (one, digest_of(f"{one} {two}".encode()))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["schemaVersion", "mediaType", "config", "layers", "manifests", "digest", "rootfs", "size"]), x
)))  # fmt: skip
def test_any_json_is_read_or_refused(document: object) -> None:
    data = json.dumps(document).encode()
    for read in (parse_config, parse_manifest_or_index):
        with suppress(InvalidArgument):
            read(data, "document")
