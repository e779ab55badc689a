"""What a container's log tells of it: its name, image, tag, and those of its labels and variables that were asked for.

Pure. The options "tag", "labels", "labels-regex", "env" and "env-regex" end here; the rest is for the tasks leaf.
"""

import re
from collections.abc import Callable, Iterable, Mapping

from corral.api.engine.v1.engine_pb2 import ContainerConfig
from corral.api.tasks.v1.tasks_pb2 import LogOptions
from corral.rpc.errors import InvalidArgument

OPTIONS = ("tag", "labels", "labels-regex", "env", "env-regex")
_SHORT_ID = 12
_MARKUP = re.compile(r"\{\{(.*?)\}\}")
_DAEMON = "corral"


def log_options(config: ContainerConfig, id_: str, name: str, image_id: str) -> LogOptions:
    """`config.log` as the tasks leaf wants it. Raises InvalidArgument."""
    log = LogOptions()
    log.CopyFrom(config.log)
    log.subject.name, log.subject.image = name, config.image
    if given := config.log.options:
        for option in OPTIONS:
            log.options.pop(option, None)
        log.subject.tag = tag(given.get("tag", ""), config, id_, name, image_id)
        log.subject.attributes.update(_attributes(config, given))
    return log


def check(log: LogOptions) -> None:
    """Raises InvalidArgument for a tag or a pattern that is not understood."""
    if not log.options:
        return
    tag(log.options.get("tag", ""), ContainerConfig(), "", "", "")
    for option in ("labels-regex", "env-regex"):
        _pattern(option, log.options.get(option, ""))


def tag(template: str, config: ContainerConfig, id_: str, name: str, image_id: str) -> str:
    """The text of a template in docker's markup. Raises InvalidArgument for markup that is not known.

    Source: docker's manual, "Customize log driver output".
    """
    digits = image_id.partition(":")[2]
    values = {
        "ID": id_[:_SHORT_ID],
        "FullID": id_,
        "Name": name,
        "ImageID": digits[:_SHORT_ID],
        "ImageFullID": image_id,
        "ImageName": config.image,
        "DaemonName": _DAEMON,
    }

    def filled(markup: re.Match[str]) -> str:
        word = markup[1].strip()
        if not word.startswith(".") or word[1:] not in values:
            known = ", ".join(f"{{{{.{key}}}}}" for key in values)
            raise InvalidArgument(
                f"the log tag {template!r} has {markup[0]} in it: known are {known}", reason="BAD_LOG"
            )
        return values[word[1:]]

    return _MARKUP.sub(filled, template)


def _attributes(config: ContainerConfig, given: Mapping[str, str]) -> dict[str, str]:
    env = dict(assignment.split("=", 1) for assignment in config.env if "=" in assignment)
    chosen = {}
    for source, what in ((config.labels, "labels"), (env, "env")):
        wanted = _wanted(given.get(what, "").split(","), _pattern(f"{what}-regex", given.get(f"{what}-regex", "")))
        chosen.update({key: value for key, value in source.items() if wanted(key)})
    return chosen


def _wanted(names: Iterable[str], pattern: re.Pattern[str] | None) -> Callable[[str], bool]:
    named = frozenset(filter(None, (name.strip() for name in names)))
    return lambda name: name in named or (pattern is not None and pattern.search(name) is not None)


def _pattern(option: str, text: str) -> re.Pattern[str] | None:
    try:
        return re.compile(text) if text else None
    except re.error as e:
        raise InvalidArgument(f"log option {option}={text!r} is no regular expression: {e}", reason="BAD_LOG") from e
