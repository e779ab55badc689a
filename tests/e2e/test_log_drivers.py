"""Logs that go elsewhere: to a syslog server, to the journal, to a program; and the options of those that stay."""

import json
import os
import re
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.cli import eventually, ok
from support.corrald import Corrald, running
from support.requirements import needs

pytestmark = needs("root", "overlayfs", "busybox", "netns")

LOGGER = """#!/bin/sh
dir=$2
echo "$CONTAINER_NAMESPACE $CONTAINER_ID" > $dir/env
env | grep -v -e ^PWD= -e ^SHLVL= -e ^_= | wc -l >> $dir/env
cat <&3 > $dir/out 5>&- &
cat <&4 > $dir/err 5>&- &
exec 3<&- 4<&-
exec 5>&-
wait
echo done > $dir/done
"""


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal") / "socket"


@pytest.fixture(scope="module")
def box(busybox_archive: Path, journal: Path) -> Iterator[Corrald]:
    with running(settings={"tasks": {"journal_socket": str(journal)}}) as daemon:
        daemon.corral("image", "import", str(busybox_archive), "--as", "busybox", check=True)
        yield daemon


def refused(box: Corrald, *args: str) -> str:
    result = box.corral("run", "-d", "--name", "refused", *args, "busybox", "true")
    assert result.returncode == 125, result
    assert box.corral("inspect", "refused").returncode == 1, "something was left"
    return result.stderr.decode()


def listening(path: Path, kind: socket.SocketKind = socket.SOCK_DGRAM) -> socket.socket:
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, kind)
    server.bind(os.fspath(path))
    server.settimeout(10)
    return server


def test_each_line_is_a_message_of_syslog_with_priority_and_tag(box: Corrald, name: str, tmp_path: Path) -> None:
    with closing(listening(tmp_path / "log")) as server:
        options = (
            f"syslog-address=unixgram://{tmp_path}/log",
            "syslog-facility=local3",
            "tag={{.Name}}/{{.ImageName}}",
        )
        flags = [word for option in options for word in ("--log-opt", option)]
        ok(
            box,
            "run",
            "-d",
            "--name",
            name,
            "--log-driver",
            "syslog",
            *flags,
            "busybox",
            "sh",
            "-c",
            "echo a b; echo c >&2",
        )
        got = sorted(server.recv(65536).decode() for _ in range(2))
    info, error = (19 << 3 | 6, 19 << 3 | 3)
    time_ = r"[A-Z][a-z]{2} [ 1-3]\d \d\d:\d\d:\d\d"
    assert re.fullmatch(rf"<{error}>{time_} {name}/busybox\[\d+\]: c\n", got[0])
    assert re.fullmatch(rf"<{info}>{time_} {name}/busybox\[\d+\]: a b\n", got[1])
    assert sorted(ok(box, "logs", name).splitlines()) == ["a b"], "a copy is kept to be read"


def test_syslog_over_tcp_and_udp_names_the_host(box: Corrald, name: str) -> None:
    host = socket.gethostname()
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        server.settimeout(10)
        address = f"syslog-address=tcp://localhost:{server.getsockname()[1]}"
        ok(box, "run", "-d", "--name", name, "--log-driver", "syslog", "--log-opt", address,
           "--log-opt", "syslog-format=rfc5424micro", "busybox", "sh", "-c", "seq 1000")  # fmt: skip
        server.accept()[0].close()  # it was only looked whether somebody is there
        stream, _ = server.accept()
        with stream, stream.makefile("rb") as lines:
            got = [line.decode() for line in lines]
    short = ok(box, "inspect", "-f", "{{.Id}}", name)[:12]
    header = (
        rf"<30>1 \d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{{6}}(Z|[+-]\d\d:\d\d) {re.escape(host)} {short} \d+ {short} - "
    )
    assert [re.sub(f"^{header}", "", line) for line in got] == [f"{n}\n" for n in range(1, 1001)]
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(10)
        address = f"syslog-address=udp://127.0.0.1:{server.getsockname()[1]}"
        ok(box, "run", "--rm", "--log-driver", "syslog", "--log-opt", address, "busybox", "echo", "hi")
        assert re.fullmatch(
            rf"<30>\w+ [ \d]\d [\d:]+ {re.escape(host)} [0-9a-f]{{12}}\[\d+\]: hi\n", server.recv(9999).decode()
        )


@pytest.mark.parametrize("killed", [False, True], ids=["same-shim", "another-shim"])
def test_a_syslog_server_that_comes_back_gets_what_was_written_meanwhile(
    box: Corrald, name: str, tmp_path: Path, killed: bool
) -> None:
    where = tmp_path / "log"
    server = listening(where)
    script = "echo one; while [ ! -e /go ]; do usleep 5000; done; echo two; echo three; sleep 1000"
    to = f"syslog-address=unix://{where}"
    ok(box, "run", "-d", "--name", name, "--log-driver", "syslog", "--log-opt", to, "busybox", "sh", "-c", script)
    assert server.recv(9999).endswith(b": one\n")
    server.close()
    where.unlink()
    ok(box, "exec", name, "touch", "/go")
    eventually(lambda: "three" in ok(box, "logs", name))
    if killed:
        kill_shim(box, name)
    with closing(listening(where)) as server:
        assert [server.recv(9999).rpartition(b": ")[2] for _ in range(2)] == [b"two\n", b"three\n"]


def kill_shim(box: Corrald, name: str) -> None:
    shim = json.loads(ok(box, "inspect", name))[0]["shim_pid"]
    os.kill(shim, signal.SIGKILL)
    eventually(lambda: json.loads(ok(box, "inspect", name))[0]["shim_pid"] not in (0, shim))


def fields_of(entry: bytes) -> dict[str, bytes]:
    """An entry in the journal's native protocol."""
    found = {}
    while entry:
        name, _, rest = entry.partition(b"\n")
        if b"=" in name:
            key, _, value = name.partition(b"=")
            found[key.decode()], entry = value, rest
        else:
            (size,) = struct.unpack("<Q", rest[:8])
            found[name.decode()], entry = rest[8 : 8 + size], rest[9 + size :]
    return found


def test_the_journal_gets_entries_with_the_fields_that_docker_writes(box: Corrald, name: str, journal: Path) -> None:
    with closing(listening(journal)) as server:
        ok(box, "run", "-d", "--name", name, "--log-driver", "journald", "--log-opt", "labels=role,priority",
           "--log-opt", "env=COLOUR", "--log-opt", "tag=my {{.Name}}", "-l", "role=db\nslave", "-l", "other=x",
           "-l", "priority=0", "-e", "COLOUR=red", "busybox", "sh", "-c", "echo hello; echo oops >&2")  # fmt: skip
        entries = sorted((fields_of(server.recv(65536)) for _ in range(2)), key=lambda entry: entry["MESSAGE"])
    id_ = ok(box, "inspect", "-f", "{{.Id}}", name).strip()
    hello, oops = entries
    at = hello.pop("SYSLOG_TIMESTAMP").decode()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", at)
    assert hello == {
        "MESSAGE": b"hello",
        "PRIORITY": b"6",
        "CONTAINER_ID": id_[:12].encode(),
        "CONTAINER_ID_FULL": id_.encode(),
        "CONTAINER_NAME": name.encode(),
        "CONTAINER_TAG": f"my {name}".encode(),
        "SYSLOG_IDENTIFIER": f"my {name}".encode(),
        "IMAGE_NAME": b"busybox",
        "ROLE": b"db\nslave",
        "COLOUR": b"red",
    }
    assert (oops["MESSAGE"], oops["PRIORITY"]) == (b"oops", b"3")
    assert "oops" in box.corral("logs", name).stderr.decode()


def test_what_no_datagram_holds_reaches_the_journal_in_a_sealed_file(
    box: Corrald, name: str, journal: Path, tmp_path: Path
) -> None:
    big = "x" * 120_000  # of a string Linux gives a program no more
    variables = tmp_path / "variables"
    variables.write_text("".join(f"{key}={big}\n" for key in "ABC"))
    with closing(listening(journal)) as server:
        ok(box, "run", "-d", "--name", name, "--log-driver", "journald", "--log-opt", "env-regex=^[ABC]$",
           "--env-file", str(variables), "busybox", "/bin/echo", "hi")  # fmt: skip
        data, fds, _, _ = socket.recv_fds(server, 9999, 1)
    assert data == b""
    with os.fdopen(fds[0], "rb") as file:
        entry = fields_of(os.pread(fds[0], 1 << 20, 0))
        with pytest.raises(PermissionError):
            os.ftruncate(file.fileno(), 0)
    assert (entry["MESSAGE"], len(entry["A"]), len(entry["C"])) == (b"hi", len(big), len(big))


def test_a_line_longer_than_a_message_comes_in_numbered_pieces(box: Corrald, name: str, journal: Path) -> None:
    with closing(listening(journal)) as server:
        ok(box, "run", "-d", "--name", name, "--log-driver", "journald", "busybox", "sh", "-c",
           "head -c 40000 /dev/zero | tr '\\0' x; echo; echo y")  # fmt: skip
        entries = [fields_of(server.recv(65536)) for _ in range(4)]
    assert [len(entry["MESSAGE"]) for entry in entries] == [16384, 16384, 7232, 1]
    assert [entry.get("CONTAINER_PARTIAL_ORDINAL") for entry in entries] == [b"1", b"2", b"3", None]
    assert [entry.get("CONTAINER_PARTIAL_MESSAGE") for entry in entries] == [b"true", b"true", None, None]
    assert len({entry.get("CONTAINER_PARTIAL_ID") for entry in entries[:3]}) == 1


def test_a_journal_that_takes_nothing_costs_bytes_and_not_the_containers_time(
    box: Corrald, name: str, journal: Path
) -> None:
    with closing(listening(journal)):
        began = time.monotonic()
        ok(
            box,
            "run",
            "--name",
            name,
            "--log-driver",
            "journald",
            "--log-opt",
            "max-buffer-size=64k",
            "busybox",
            "seq",
            "50000",
        )
        assert time.monotonic() - began < 20
    assert ok(box, "logs", "-n", "1", name) == "50000\n"


@pytest.fixture
def logger(tmp_path: Path) -> Path:
    program = tmp_path / "logger.sh"
    program.write_text(LOGGER)
    program.chmod(0o755)
    return program


def test_a_program_gets_both_streams_and_its_arguments(box: Corrald, name: str, logger: Path, tmp_path: Path) -> None:
    uri = f"binary://{logger}?dir={tmp_path}"
    result = box.corral(
        "run", "--name", name, "--log-driver", uri, "busybox", "sh", "-c", "printf 'a\\0b'; echo no >&2; exit 3"
    )
    assert result.returncode == 3, result.stderr
    eventually((tmp_path / "done").exists)
    assert ((tmp_path / "out").read_bytes(), (tmp_path / "err").read_bytes()) == (b"a\0b", b"no\n")
    id_ = ok(box, "inspect", "-f", "{{.Id}}", name).strip()
    assert (tmp_path / "env").read_text() == f"default {id_}\n2\n"


def test_a_program_outlives_the_daemon_and_the_shim_and_misses_nothing(
    box: Corrald, name: str, logger: Path, tmp_path: Path
) -> None:
    script = "i=0; while [ ! -e /go ]; do i=$((i+1)); echo $i; usleep 2000; done; echo end"
    ok(
        box,
        "run",
        "-d",
        "--name",
        name,
        "--log-driver",
        f"binary://{logger}?dir={tmp_path}",
        "busybox",
        "sh",
        "-c",
        script,
    )
    box.kill9()
    box.start()
    kill_shim(box, name)
    ok(box, "exec", name, "touch", "/go")
    assert ok(box, "wait", name) == "0\n"
    eventually((tmp_path / "done").exists)
    *numbers, end = (tmp_path / "out").read_text().splitlines()
    assert (numbers, end) == ([str(n) for n in range(1, len(numbers) + 1)], "end")


def test_a_program_that_ends_early_holds_up_no_container(box: Corrald, name: str, tmp_path: Path) -> None:
    program = tmp_path / "brief"
    program.write_text("#!/bin/sh\nexec 5>&-\nexec 3<&- 4<&-\nsleep 1\n")
    program.chmod(0o755)
    assert (
        ok(box, "run", "--name", name, "--log-driver", f"binary://{program}", "busybox", "seq", "100000").count("\n")
        == 100000
    )
    assert json.loads(ok(box, "inspect", name))[0]["exit"]["code"] == 0


@pytest.mark.parametrize(
    ("driver", "options", "told"),
    [
        ("syslog", ("syslog-address=unix:///no/such/socket",), "/no/such/socket"),
        ("syslog", ("syslog-address=ftp://x",), "give unix:///dev/log"),
        ("syslog", ("syslog-address=tcp://127.0.0.1:1",), "tcp://127.0.0.1:1 cannot be reached"),
        ("syslog", ("syslog-address=tcp+tls://127.0.0.1:1",), "not there yet"),
        ("syslog", ("syslog-facility=nobody",), "syslog-facility 'nobody'"),
        ("syslog", ("syslog-format=json",), "syslog-format 'json'"),
        ("syslog", ("max-size=1m",), "no option 'max-size'"),
        ("syslog", ("tag={{.Nothing}}",), "{{.Nothing}}"),
        ("journald", ("syslog-facility=user",), "no option 'syslog-facility'"),
        ("journald", (), "socket"),
        ("json-file", ("mode=blocking",), "no container of corral waits for its log"),
        ("json-file", ("compress=true",), "no option 'compress'"),
        ("syslog", ("max-buffer-size=1g",), "give 64m or less"),
        ("json-file", ("max-file=many",), "max-file"),
        ("json-file", ("labels-regex=(",), "no regular expression"),
        ("splunk", (), "'splunk' is not known"),
        ("binary://relative", (), "give binary:///path"),
        ("binary:///no/such/program", (), "/no/such/program is no program"),
        ("binary:///usr/bin/../bin/true", (), "'..'"),
        ("binary:///bin/false", (), "ended before it was ready"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(
    box: Corrald, driver: str, options: tuple[str, ...], told: str
) -> None:
    flags = [word for option in options for word in ("--log-opt", option)]
    message = refused(box, "--log-driver", driver, *flags)
    assert told in message
    assert message.count("\n") == 1, message


def test_lines_of_a_json_file_tell_labels_variables_and_tag(box: Corrald, name: str) -> None:
    ok(box, "run", "--name", name, "--log-opt", "labels=role,priority", "--log-opt", "env-regex=^COL",
       "--log-opt", "tag={{.Name}}", "-l", "role=db", "-l", "no=x", "-e", "COLOUR=red",
       "busybox", "echo", 'say "hi"')  # fmt: skip
    path = ok(box, "inspect", "-f", "{{.LogPath}}", name).strip()
    line = json.loads(Path(path).read_text())
    assert line["attrs"] == {"role": "db", "COLOUR": "red", "tag": name}
    assert ok(box, "logs", name) == 'say "hi"\n'


def test_without_a_cache_there_is_nothing_to_read_and_that_is_said(box: Corrald, name: str, tmp_path: Path) -> None:
    with closing(listening(tmp_path / "log")):
        ok(box, "run", "--name", name, "--log-driver", "syslog", "--log-opt", f"syslog-address=unix://{tmp_path}/log",
           "--log-opt", "cache-disabled=true", "busybox", "echo", "hi")  # fmt: skip
    result = box.corral("logs", name)
    assert result.returncode == 1
    assert "keeps no log that can be read: it was created with log driver 'syslog'" in result.stderr.decode()
