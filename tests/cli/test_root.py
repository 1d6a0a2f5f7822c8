"""The root command: verbs by file, lazily imported, errors in one place."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer

from modicum import errors
from modicum._version import __version__
from modicum.cli import _root
from modicum.cli._common import JsonFlag, emit


def _run(capsys, *args):
    """(exit code, stdout, stderr) of `modicum ARGS`."""
    with pytest.raises(SystemExit) as exit_:
        _root.main(args)
    out, err = capsys.readouterr()
    return exit_.value.code, out, err


@pytest.fixture
def verb(monkeypatch, tmp_path):
    """Puts one verb called `try-it` in place of all others; its `run` raises what it is given."""

    def install(error=None, result=None):
        def run(as_json: JsonFlag = False) -> None:
            """Try it and see."""
            if error is not None:
                raise error
            emit(result, as_json, str)

        command = typer.Typer(add_completion=False, rich_markup_mode=None)
        command.command()(run)
        file = tmp_path / "try_it_.py"
        file.write_text('"""Try it.\n\nMore.\n"""\nimport torch\n')
        monkeypatch.setattr(_root, "verbs", lambda: {"try-it": file})
        monkeypatch.setattr(_root, "summary", lambda verb: "Try it.")
        monkeypatch.setattr(_root, "load", lambda verb: typer.main.get_command(command))

    return install


def test_version(capsys):
    assert _run(capsys, "--version") == (0, f"{__version__}\n", "")


def test_help_shows_one_line_per_verb(capsys):
    code, out, _ = _run(capsys, "--help")
    assert code == 0
    for verb in _root.verbs():
        assert f"  {verb} " in out


@pytest.mark.parametrize("verb", _root.verbs())
def test_every_verb_has_a_summary_and_help(verb, capsys):
    assert _root.summary(verb).endswith("."), "the first line of the module docstring is the verb's summary"
    assert len(_root.summary(verb)) <= 100
    code, out, _ = _run(capsys, verb, "--help")
    assert code == 0
    assert "--help" in out


@pytest.mark.parametrize("verb", _root.verbs())
def test_help_of_a_verb_imports_nothing_heavy(verb):
    code = (
        f"from modicum.cli import main\ntry: main([{verb!r}, '--help'])\nexcept SystemExit: pass\n"
        "import sys; print('\\n' + str([m for m in ('torch', 'peft', 'transformers') if m in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_no_arguments_show_the_help(capsys):
    code, out, err = _run(capsys)
    assert code == 2
    assert "Usage: modicum" in out + err


def test_an_unknown_verb_names_the_nearest(capsys):
    code, _, err = _run(capsys, "plam")
    assert code == 2
    assert "no verb 'plam' (did you mean 'plan'?)" in err


def test_wrong_usage_as_json(capsys):
    code, out, err = _run(capsys, "plan", "--json", "--nonsense")
    assert (code, err) == (2, "")
    assert "--nonsense" in json.loads(out)["error"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.ConfigError("r = 0, must be at least 1"), "r = 0, must be at least 1"),
        (OSError(28, "No space left on device", "adapter.bin"), "No space left on device: adapter.bin"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (FileNotFoundError(2, "No such file or directory", "x.yaml"), "No such file or directory: x.yaml"),
        (ZeroDivisionError("oh"), "unexpected ZeroDivisionError: oh (--debug shows where)"),
    ],
)
def test_errors_are_one_line(error, message, verb, capsys):
    verb(error)
    assert _run(capsys, "try-it") == (1, "", f"error: {message}\n")
    code, out, err = _run(capsys, "try-it", "--json")
    assert (code, err) == (1, "")
    assert json.loads(out) == {"error": message, "kind": type(error).__name__}


@pytest.mark.parametrize("args", [["--debug", "try-it"], ["try-it", "--debug"]])
def test_debug_shows_where(args, verb, capsys):
    verb(ZeroDivisionError("oh"))
    code, _, err = _run(capsys, *args)
    assert code == 1
    assert "Traceback" in err


def test_debug_by_environment(verb, capsys, monkeypatch):
    monkeypatch.setenv("MODICUM_DEBUG", "1")
    verb(ZeroDivisionError("oh"))
    assert "Traceback" in _run(capsys, "try-it")[2]


def test_interrupt(verb, capsys):
    verb(KeyboardInterrupt())
    assert _run(capsys, "try-it")[0] == 130


def test_success(verb, capsys):
    verb(result={"a": 1})
    assert _run(capsys, "try-it", "--json") == (0, '{"a": 1}\n', "")
    assert _run(capsys, "try-it") == (0, "{'a': 1}\n", "")


def test_what_follows_two_dashes_is_no_option(verb, capsys):
    verb(errors.ConfigError("no"))
    code, out, err = _run(capsys, "try-it", "--", "--json")
    assert code == 2
    assert (out, "{" in err) == ("", False)


def test_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "modicum", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == __version__
