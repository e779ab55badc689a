"""Lines of a Dockerfile change an image's config."""

import pytest

from corral.api.images.v1.images_pb2 import ImageConfig
from corral.engine.changes import change
from corral.rpc.errors import InvalidArgument


def changed(*lines: str, **before: object) -> ImageConfig:
    config = ImageConfig(**before)  # type: ignore[arg-type]
    change(config, lines)
    return config


def test_commands_are_words_or_a_line_for_the_shell() -> None:
    config = changed('CMD ["top", "-b"]', "entrypoint exec  top -b", cmd=["old"])
    assert list(config.cmd) == ["top", "-b"]
    assert list(config.entrypoint) == ["/bin/sh", "-c", "exec  top -b"]


def test_variables_are_replaced_where_they_were_and_added_at_the_end() -> None:
    config = changed('ENV B=2 C="3 4"', "ENV A the rest of it", env=["A=1", "B=1"])
    assert list(config.env) == ["A=the rest of it", "B=2", "C=3 4"]


def test_labels_ports_volumes_user_signal_and_directory() -> None:
    config = changed(
        "LABEL a=b", "LABEL c d e", "EXPOSE 80 53/udp 80/tcp", 'VOLUME ["/a b"]', "VOLUME /c /d", "USER 1:2",
        "STOPSIGNAL SIGINT", "WORKDIR /x", "WORKDIR y/../z",
    )  # fmt: skip
    assert dict(config.labels) == {"a": "b", "c": "d e"}
    assert list(config.exposed_ports) == ["80/tcp", "53/udp"]
    assert list(config.volumes) == ["/a b", "/c", "/d"]
    assert (config.user, config.stop_signal, config.working_dir) == ("1:2", "SIGINT", "/x/z")


@pytest.mark.parametrize(
    "line", ["RUN rm", "CMD", "", "ENV A", "ENV A=1 B", 'CMD ["a"', "CMD [1]", "EXPOSE x", "EXPOSE 0", "EXPOSE 1/x",
             'LABEL "a'],
)  # fmt: skip
def test_a_line_that_means_nothing_is_refused(line: str) -> None:
    with pytest.raises(InvalidArgument, match="is not understood"):
        changed(line)
