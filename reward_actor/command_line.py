"""The dialect of our commands: `--kebab-case value`, `--flag/--no-flag`, one line for a mistake."""

from __future__ import annotations

import argparse
import difflib
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from reward_actor import clashes, terminal
from reward_actor.errors import RewardServiceError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

# What the extra of a command does not bring.
_EXTRAS = {"vllm": "rollout", "peft": "peft", "bitsandbytes": "peft"}
_BOOLEANS = {
    "true": True, "yes": True, "on": True, "1": True,
    "false": False, "no": False, "off": False, "0": False,
}  # fmt: skip
_SUFFIXES = {
    "_s": "SECONDS", "_tokens": "TOKENS", "_bytes": "BYTES",
    "_column": "NAME", "_dir": "DIR", "_file": "FILE",
}  # fmt: skip
_TYPES = {int: "INT", float: "FLOAT", dict: "YAML", list: "YAML"}


class Flag(argparse.BooleanOptionalAction):
    """`--flag` and `--no-flag`; the help is what it is given, without a Python default."""

    def __init__(self, *args: Any, help: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = help


class Parser(argparse.ArgumentParser):
    """A parser of the dialect. Use `parse`, which raises ValueError of one line where argparse
    would print its usage and exit."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.add_argument(
            "--verbose",
            action=Flag,
            default=False,
            help="show what other libraries print, which goes to a log file otherwise [off]",
        )

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Raises ValueError, which names the nearest option where one is unknown."""
        parsed, unknown = self.parse_known_args(self._current(arguments))
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        return parsed

    def print_help(self, file: Any = None) -> None:
        super().print_help(file or terminal.out())

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')}; {self._list_of_options}")

    @property
    def _list_of_options(self) -> str:
        return f"{self.prog} --help lists the options"

    def _current(self, arguments: Sequence[str]) -> list[str]:
        """The arguments in today's spelling: before it options had the underscores of their keys,
        and flags a value. Such a one is taken with a warning."""
        rest, current = list(arguments), list[str]()
        while rest:
            argument = rest.pop(0)
            typed, _, value = argument.partition("=")
            if argument == "--":
                return [*current, argument, *rest]
            if not typed.startswith("--") or " " in typed:  # as argparse tells options from values
                current.append(argument)
                continue
            name = typed.replace("_", "-")
            action = self._option_string_actions.get(name)
            if action is None:
                near = nearest(name, self._option_string_actions, self._list_of_options)
                raise ValueError(f"unknown option {typed}{near}")
            new = name + argument[len(typed) :]
            if isinstance(action, Flag) and name == action.option_strings[0]:
                if not value and rest and rest[0].lower() in _BOOLEANS:
                    value = rest.pop(0)
                    argument += f" {value}"
                if value.lower() in _BOOLEANS:
                    new = action.option_strings[0 if _BOOLEANS[value.lower()] else 1]
            if new != argument:
                terminal.warn(f"{argument} is spelled {new} now")
            current.append(new)
        return current


def run_process(name: str, run: Callable[[], int]) -> int:
    """Run a command that is this process's own: its terminal is for our lines, and the directory
    that it runs in is no place for imports. The exit code."""
    terminal.take_over(name, verbose="--verbose" in sys.argv)
    clashes.leave_working_directory()
    try:
        clashes.check()
        return run()
    except ValueError as error:
        return complain(error)
    except Exception as error:  # nothing here may end without a line
        return _unforeseen(error)
    finally:
        terminal.drop_log()


def run_command(
    parser: Callable[[], Parser],
    run: Callable[[argparse.Namespace], int],
    arguments: Sequence[str],
    extra: str | None,
) -> int:
    """The exit code of a command: its own, 2 for what the user can put right, in one line, and 130
    for an interrupt. `extra`: of our package, with what the command imports."""
    prog = "this command"
    try:
        made = parser()
        prog = made.prog
        return run(made.parse(arguments))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if extra is None or package in ("", *terminal.PACKAGES):
            raise
        extra = _EXTRAS.get(package, extra)
        return complain(
            f'{prog} needs {package}, which is not installed: pip install "rayward[{extra}]"'
        )
    except (ValueError, OSError, RewardServiceError) as error:
        return complain(error)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _unforeseen(error)


def complain(error: Exception | str, status: int = 2) -> int:
    """Print the error, and return the exit code for it. Where a library or our own code has failed,
    rather than its user, the file with the output of libraries is named."""
    failed = status == 1 or getattr(error, "__cause__", None) is not None
    if isinstance(error, OSError) and error.strerror:  # without its number
        name = "" if error.filename is None else f"{error.filename}: "
        error = f"{name}{error.strerror[:1].lower()}{error.strerror[1:]}"
    log = terminal.named_log() if failed else None
    more = "" if log is None else f" (what libraries printed is in {log})"
    terminal.note(f"error: {error}{more}")
    return status


def _unforeseen(error: Exception) -> int:
    traceback.print_exc()  # to the log
    lines = str(error).strip().splitlines() or [""]
    # Ray's errors hold another process's traceback, whose end says what went wrong.
    said = lines[-1] if type(error).__module__.startswith("ray.") else lines[0]
    return complain(f"{type(error).__name__}: {said}", 1)


def nearest(name: str, known: Collection[str], otherwise: str) -> str:
    """A clause to append to a complaint about `name`."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; {otherwise}"


def option(key: str) -> str:
    """A setting as it is typed."""
    return "--" + key.replace("_", "-")


def add_setting(place: argparse._ActionsContainer, key: str, field: FieldInfo, dest: str) -> None:
    """An option for a setting, absent unless it is given. Its value is a string, which pydantic
    reads, or for a flag a bool."""
    kwargs: dict[str, Any] = {}
    if field.annotation is bool:
        kwargs["action"] = Flag
    else:
        kwargs["metavar"] = _metavar(key, field.annotation)
    default = "required" if field.is_required() else shown(field.default)
    help = f"{field.description} [{default}]" if default else field.description or ""
    place.add_argument(
        option(key), dest=dest, default=argparse.SUPPRESS, help=help.replace("%", "%%"), **kwargs
    )


def shown(value: Any) -> str:
    """A default as one would type it; on or off for that of a flag."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _metavar(key: str, annotation: Any) -> str:
    for suffix, metavar in _SUFFIXES.items():
        if key.endswith(suffix):
            return metavar
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(args)
    if origin is Annotated:
        return _metavar(key, args[0])
    if origin in (Union, UnionType):
        return "|".join(_metavar(key, arg) for arg in args if arg is not NoneType)
    return _TYPES.get(origin or annotation, "TEXT")
