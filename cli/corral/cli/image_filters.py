"""What `--filter` of `corral images` and `corral image prune` takes, as docker has it.

Source: docker/cli, docs/reference/commandline/image_ls.md "Filtering", image_prune.md "Filtering".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from corral.api.images.v1 import images_pb2
    from corral.client.sync import Client

_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, slots=True)
class PruneFilters:
    """Only images made before `until`, with all of `labels` ("KEY" or "KEY=VALUE") and none of `without_labels`."""

    until: "Timestamp | None"
    labels: tuple[str, ...]
    without_labels: tuple[str, ...]


def parse_prune_filters(texts: Sequence[str]) -> PruneFilters:
    """Raises ValueError."""
    from corral.cli.moments import parse_moment

    until, labels, without = None, list[str](), list[str]()
    for text in texts:
        key, _, value = text.partition("=")
        if key == "until" and value:
            until = parse_moment(value)
        elif key == "label" and value:
            labels.append(value)
        elif key == "label!" and value:
            without.append(value)
        else:
            raise ValueError(
                f"filter {text!r} is not understood: give until=TIME, such as until=24h, or label[!]=KEY[=VALUE]"
            )
    return PruneFilters(until, tuple(labels), tuple(without))


def find_images(client: "Client", pattern: str, texts: Sequence[str]) -> "list[images_pb2.Image]":
    """Those of a pattern, and of any that filters name, that all other filters let through.

    Raises ValueError; NotFound for an image that a filter compares with.
    """
    patterns = [pattern] if pattern else []
    tests: list[Callable[[images_pb2.Image], bool]] = []
    for text in texts:
        key, _, value = text.partition("=")
        if key == "reference" and value:
            patterns.append(value)
        else:
            tests.append(_test(client, text, key, value))
    found = {image.name or image.id: image for each in patterns or [""] for image in client.images.list(each)}
    return [found[name] for name in sorted(found) if all(test(found[name]) for test in tests)]


def _test(client: "Client", text: str, key: str, value: str) -> "Callable[[images_pb2.Image], bool]":
    from corral.cli.moments import parse_moment

    if key == "dangling" and value in _TRUTHS:
        return lambda image: bool(image.name) != _TRUTHS[value]
    if key in ("label", "label!") and value:
        return lambda image: _has_label(image, value) == (key == "label")
    if key in ("before", "since", "until") and value:
        limit = parse_moment(value) if key == "until" else client.images.get(value).created_at
        sign = 1 if key == "since" else -1
        return lambda image: (image.created_at.ToNanoseconds() - limit.ToNanoseconds()) * sign > 0
    raise ValueError(
        f"filter {text!r} is not understood: give dangling=true, label[!]=KEY[=VALUE], reference=PATTERN,"
        " before=IMAGE, since=IMAGE or until=TIME"
    )


def _has_label(image: "images_pb2.Image", label: str) -> bool:
    key, equals, value = label.partition("=")
    labels = image.config.labels
    return key in labels and (not equals or labels[key] == value)
