"""What the command loads on its way to the daemon: each module is a part of a millisecond of every run."""

import gettext
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from corral.api.engine.v1 import engine_pb2
from corral.cli import deferred, messages, stubs
from corral.cli.app import App
from corral.cli.main import load_verb

if TYPE_CHECKING:
    from corral.client.sync import Client

ELSEWHERE = "unix:///tmp/corral-nowhere.sock"
NEVER = {"dataclasses", "ipaddress", "urllib.parse", "google.rpc", "rich", "aiohttp", "corral.rpc.context"}
OF_DEFERRED = {
    "asyncio.events",
    "grpc.aio._call",
    "ssl",
    "google.protobuf.text_format",
    "_colorize",
    "_ast",
    "_tokenize",
    "dis",
    "locale",
}
OF_MAKING = {
    "pathlib",
    "corral.cli.run",
    "corral.client.options",
    "corral.client.network_options",
    "corral.client.fetching",
}
OF_TERMINALS = {"corral.cli.terminal", "termios"}
OF_TABLES = {"json.decoder", "corral.cli.output"}
OF_FAILURES = {"grpc._cython.cygrpc", "logging", "corral.client.call_failed", "corral.rpc.huffman"}
OF_PLAIN_MESSAGES = {"google.protobuf.text_encoding", "google.protobuf.reflection", "google.protobuf.message_factory"}
MODULES_OF_MESSAGES = sorted(
    ".".join(path.relative_to(place).with_suffix("").parts)
    for place in [Path(engine_pb2.__file__).parents[4]]
    for path in place.rglob("*_pb2.py")
)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of who has containers, and knows nothing else."""

    container = engine_pb2.Container(id="a" * 64, name="here", status=engine_pb2.STATUS_EXITED)
    containers = engine_pb2.ListContainersResponse(containers=[container])
    answers = {"List": containers.SerializeToString(), "Get": container.SerializeToString()}
    answers |= dict.fromkeys(("Start", "Pause"), container.SerializeToString())

    def handler(answer: bytes) -> "grpc.RpcMethodHandler[bytes, bytes]":
        return grpc.unary_unary_rpc_method_handler(lambda request, context: answer)

    handlers = {method: handler(answer) for method, answer in answers.items()}
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("corral.engine.v1.Containers", handlers)])
    server.add_insecure_port(f"unix:{tmp_path}/socket")
    server.start()
    yield f"unix://{tmp_path}/socket"
    server.stop(None).wait()


@pytest.mark.parametrize("words", ["ps", "inspect here", "start here", "pause here"])
def test_a_call_that_goes_well_needs_nothing_of_grpc_and_little_of_protobuf(address: str, words: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "corral.cli.command", "--address", address, *words.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "here" in result.stdout
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "corral.client.local_channel" in loaded
    unwanted = NEVER | OF_DEFERRED | OF_MAKING | OF_TERMINALS | OF_FAILURES | {"corral.client.execution"}
    assert not loaded & (unwanted if "inspect" in words else unwanted | OF_PLAIN_MESSAGES)


def test_protobuf_without_c_does_too(address: str) -> None:
    environment = os.environ | {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    command = [sys.executable, "-m", "corral.cli.command", "--address", address, "ps", "--format", "json"]
    said = [subprocess.check_output(command, env=env, text=True) for env in (environment, os.environ)]
    assert said[0] == said[1]
    assert '"status": "exited"' in said[0]


@pytest.fixture(scope="module")
def describing() -> Sequence[str]:
    """Prints all that modules with messages define."""
    return (
        f"modules = [importlib.import_module(name) for name in {MODULES_OF_MESSAGES}]",
        "for module in modules:",
        "    found = [*module.DESCRIPTOR.message_types_by_name, *module.DESCRIPTOR.enum_types_by_name]",
        "    found += [v for e in module.DESCRIPTOR.enum_types_by_name.values() for v in e.values_by_name]",
        "    for name in found:",
        "        value = getattr(module, name)",
        "        assert getattr(module, name) is value and getattr(module, 'Nothing', None) is None",
        "        kind = type(value).__name__",
        "        made = value.keys() if kind == 'EnumTypeWrapper' else value if kind == 'int' else repr(value())",
        "        more = getattr(value, '__module__', ''), getattr(value, '__qualname__', '')",
        "        print(module.__name__, name, kind, made, more, getattr(value, 'DESCRIPTOR', value) is value)",
    )


@pytest.fixture(scope="module")
def plain(describing: Sequence[str]) -> str:
    """What they define by themselves."""
    return python(*describing)


def test_messages_that_are_made_on_demand_are_those_that_are_made_at_once(
    describing: Sequence[str], plain: str
) -> None:
    assert python("from corral.cli.deferred import defer; defer()", *describing) == plain
    assert plain.count("MessageMeta") > 100


@pytest.mark.parametrize("name", ["default_pool", "MessageMeta"])
def test_a_library_that_has_not_what_makes_them_on_demand_makes_them_at_once(
    describing: Sequence[str], plain: str, name: str
) -> None:
    result = python(
        "from corral.cli.deferred import defer; defer()",
        "import google._upb._message, types",
        "real = google._upb._message",
        f"google._upb._message = types.SimpleNamespace(**vars(real) | {{{name!r}: None}})",
        f"del google._upb._message.{name}",
        "from corral.cli import messages",
        "google._upb._message = real",
        "assert not messages.STAND_INS",
        *describing,
    )
    assert result == plain


@pytest.mark.parametrize("failure", ["KeyboardInterrupt", "OSError", "MemoryError"])
@pytest.mark.parametrize(
    ("loaded", "use"),
    [
        ("google.protobuf.internal.well_known_types", "engine_pb2.Container"),
        ("grpc._compression", "grpc.StatusCode"),
        ("grpc._compression", "errors.CorralError"),
    ],
)
def test_what_was_interrupted_or_could_not_be_loaded_is_loaded_next_time(failure: str, loaded: str, use: str) -> None:
    happens = "os.kill(os.getpid(), signal.SIGINT)" if failure == "KeyboardInterrupt" else f"raise {failure}"
    result = python(
        "import os, signal",
        "class Failing:",
        "    def find_spec(name, path=None, target=None):",
        f"        if name == {loaded!r}:",
        "            sys.meta_path.remove(Failing)",
        f"            {happens}",
        "from corral.cli.deferred import defer; defer()",
        "import grpc",
        "from corral.api.engine.v1 import engine_pb2",
        "from corral.rpc import errors",
        "sys.meta_path.insert(0, Failing)",
        "try:",
        f"    {use}",
        f"except {failure}:",
        f"    print('{failure}', {use}.__name__, signal.getsignal(signal.SIGINT) is signal.default_int_handler)",
    )
    assert result.split() == [failure, use.rpartition(".")[2], "True"]


@pytest.mark.parametrize(
    ("happens", "code", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGINT)", 130, ""),
        ("raise OSError(23, 'Too many open files')", 1, "corral: [Errno 23] Too many open files"),
        ("raise MemoryError", 1, "corral: MemoryError:  (this is a fault of corral; --debug shows where)"),
    ],
)
@pytest.mark.parametrize("words", [["ps"], ["stop", "x", "y"], ["start", "x"]], ids=lambda words: words[0])
def test_a_command_tells_what_befell_it_while_it_loaded_what_it_tells_failures_by(
    words: list[str], happens: str, code: int, said: str
) -> None:
    lines = (
        "import os, signal, sys",
        "class Failing:",
        "    def find_spec(name, path=None, target=None):",
        "        if name == 'grpc._compression':",
        f"            {happens}",
        "sys.meta_path.insert(0, Failing)",
        f"sys.argv[1:] = ['--address', '{ELSEWHERE}', *{words}]",
        "from corral.cli.command import main; main()",
    )
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.strip()) == (code, said)


class AppOfOneThread(App):
    """Whose client only the thread that made it gets."""

    def __init__(self) -> None:
        super().__init__(ELSEWHERE)
        self._thread = threading.current_thread()

    @property
    def client(self) -> "Client":
        assert threading.current_thread() is self._thread
        return super().client


@pytest.mark.parametrize("verb", ["stop", "restart", "kill", "rm", "pause", "unpause"])
def test_what_acts_in_threads_makes_its_client_before(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_verb(verb).main(["x", "y"], obj=AppOfOneThread(), standalone_mode=False) == 1
    assert capsys.readouterr().err.count("cannot reach corral") == 2


def test_a_message_has_one_class_whoever_makes_it_first() -> None:
    result = python(
        "from corral.cli.deferred import defer; defer()",
        "from corral.api.engine.v1 import engine_pb2",
        "from corral.api.types.v1 import types_pb2",
        "container = engine_pb2.Container(exit=types_pb2.ExitStatus(code=3))",
        "print(type(container.exit) is types_pb2.ExitStatus, type(container) is engine_pb2.Container)",
        "print(type(container.config) is engine_pb2.ContainerConfig, type(container.created_at).__name__)",
        "from google.protobuf.timestamp_pb2 import Timestamp",
        "print(type(container.created_at) is Timestamp, Timestamp(seconds=1).ToJsonString())",
    )
    assert result.splitlines() == ["True True", "True Timestamp", "True 1970-01-01T00:00:01Z"]


def test_a_stub_makes_the_calls_that_the_generated_one_makes() -> None:
    from corral.api.engine.v1 import engine_pb2_grpc
    from corral.api.images.v1 import images_pb2_grpc

    for module in (engine_pb2_grpc, images_pb2_grpc):
        for name in (name for name in dir(module) if name.endswith("Stub") and "Async" not in name):
            generated, ours = Calls(), Calls()
            made = getattr(module, name)(generated)
            stub = stubs.stub(module.__name__, name)(ours)  # type: ignore[arg-type]
            methods = sorted(vars(made))
            assert methods
            for method in methods:
                assert getattr(stub, method) == getattr(made, method)
            with pytest.raises(AttributeError):
                stub.Nothing  # noqa: B018


class Calls:
    """A channel that tells what it was asked for."""

    def __getattr__(self, form: str) -> object:
        return lambda *arguments, **options: (form, arguments, sorted(options.items(), key=lambda item: item[0]))


def test_each_stand_in_for_what_makes_messages_belongs_to_a_module_that_is_deferred() -> None:
    assert {module for module, _ in messages.STAND_INS} == deferred.OF_MESSAGES


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        (["ps"], OF_MAKING | OF_TERMINALS | {"json.decoder"}),
        (["start", "x"], OF_MAKING | OF_TERMINALS),
        (["rm", "x"], OF_MAKING | OF_TERMINALS),
        (["logs", "x"], OF_MAKING | OF_TERMINALS | {"corral.rpc.hpack"}),
        (["inspect", "x"], OF_MAKING | OF_TERMINALS),
        (["exec", "x", "true"], OF_MAKING | OF_TABLES),
        (["run", "--rm", "-p", "80", "x", "true"], {"corral.cli.registry"} | OF_TABLES),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_a_verb_loads_nothing_of_others(words: list[str], unwanted: set[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "corral.cli.command", "--address", ELSEWHERE, *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "cannot reach corral" in result.stderr
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "corral.client.sync.containers" in loaded
    assert not loaded & (NEVER | OF_DEFERRED | unwanted)


def test_nothing_is_asked_of_the_daemon_for_help() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "corral.cli.command", "run", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not {"grpc", "dis"} & {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}


@pytest.mark.parametrize(
    "doc", ["", "one", "  one\n", "\n\n  a\n\tb\n    c\n \n\n", "a\n  b\n c", "a\n   \n  b\n\n", "\n \n"]
)
def test_what_stands_in_for_a_function_of_a_deferred_module_does_the_same(doc: str) -> None:
    assert deferred.cleandoc(doc) == inspect.cleandoc(doc)
    for value in (python, lambda: None, len, deferred.DEFERRED, inspect):
        assert deferred.isfunction(value) == inspect.isfunction(value)
    assert deferred.gettext(doc) == gettext.gettext(doc)
    assert [deferred.ngettext("a", "b", n) for n in range(3)] == [gettext.ngettext("a", "b", n) for n in range(3)]


def test_what_has_a_stand_in_is_loaded_for_all_else() -> None:
    result = python(
        "from corral.cli.deferred import STAND_INS, defer; defer()",
        "[sys.modules.pop(name, None) for name, _ in STAND_INS]",
        "modules = {name: importlib.import_module(name) for name, _ in STAND_INS}",
        "print(all(getattr(modules[m], name) is stand_in for (m, name), stand_in in STAND_INS.items()))",
        "print(modules['inspect'].signature(len), modules['gettext'].NullTranslations().gettext('a'))",
        "print(modules['inspect'].cleandoc(' a'), modules['gettext'].gettext('b'))",
    )
    assert result.splitlines() == ["True", "(obj, /) a", "a b"]


def test_what_is_deferred_is_loaded_by_its_first_use_and_only_once() -> None:
    result = python(
        "from corral.cli.deferred import DEFERRED, defer; defer()",
        "modules = [importlib.import_module(name) for name in sorted(DEFERRED) * 2]",
        "print([name for name in ('ssl', '_ast', 'textwrap', 'json.decoder') if name in sys.modules])",
        "walks = []",
        "threads = [threading.Thread(target=lambda: walks.append(modules[0].walk)) for _ in range(8)]",
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]",
        "print(len(walks), len(set(walks)))",
        "[vars(module) for module in modules]",
        "print({type(module) for module in modules}, {m.__loader__ is m.__spec__.loader for m in modules})",
        "from asyncio import run",
        "import asyncio.events, json.decoder",
        "print(json.dumps([run.__name__, json.decoder is sys.modules['json.decoder']]))",
    )
    deferred, walks, kinds, json = result.splitlines()
    assert (deferred, walks) == ("[]", "8 1")
    assert kinds == "{<class 'module'>} {True}"
    assert json == '["run", true]'


def python(*lines: str) -> str:
    program = "\n".join(["import importlib, sys, threading", *lines])
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
