"""What the command loads on its way to the daemon: each module is a part of a millisecond of every run."""

import gettext
import inspect
import subprocess
import sys

import pytest

from corral.cli import deferred

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


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        (["ps"], OF_MAKING | OF_TERMINALS | {"json.decoder"}),
        (["start", "x"], OF_MAKING | OF_TERMINALS),
        (["rm", "x"], OF_MAKING | OF_TERMINALS),
        (["logs", "x"], OF_MAKING | OF_TERMINALS),
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
