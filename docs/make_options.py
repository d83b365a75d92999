"""Writes docs/options.md from the dataclasses of tinyllama_jax/config.py.

    python docs/make_options.py

A test writes the page again and compares, so that the page is never behind the code.
"""

import ast
import dataclasses
import inspect
import typing
from pathlib import Path

from tinyllama_jax.config import CHANGEABLE, Config, Launch

PAGE = Path(__file__).with_name("options.md")
HEAD = """\
# Which options does a training run have?

<!-- Written by docs/make_options.py from tinyllama_jax/config.py: edit the docstrings there. -->

Every option stands in a config file (`configs/*.py`, which builds the dataclasses below) and can be
replaced on the command line: `--optimizer.peak-lr 1e-3` replaces `peak_lr` of the config's
`optimizer`. A yes-or-no option has two spellings, `--data.mask-documents` and
`--data.no-mask-documents`. The defaults below are those of the dataclasses; the shipped configs set
many of them otherwise, and `tinyllama train CONFIG --help` shows the values that hold for a
config. An unknown name, a wrong type or a value out of range is refused with an explanation before
anything is computed. [performance.md](performance.md) explains `--profile`, the one option of
`train` that is no part of a config.

A run that goes on in its folder must have the options that it began with, because all others
decide numbers that it has already made. It may change only these: {changeable}.
"""
LAUNCH = """\
They say where a run is computed and are never part of its config. They follow the config on the
command line, without a prefix: `--data-axis 2`.
"""


def documented(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass; empty where it has none."""
    (node,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(node, ast.ClassDef)
    found, last = {}, None
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            last = statement.target.id
            found[last] = ""
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            if last:
                found[last] = " ".join(str(statement.value.value).split())
            last = None
        else:
            last = None
    return found


def choices(kind: typing.Any) -> str:
    """What a field accepts, where that is a few words."""
    if typing.get_origin(kind) is not typing.Literal:
        return ""
    return "One of " + ", ".join(f"`{value}`" for value in typing.get_args(kind)) + "."


def shown(field: dataclasses.Field) -> str:
    """The default as it would be written in a config file."""
    if field.default is dataclasses.MISSING:
        return "none: the config sets it"
    if field.default is None:
        return "not set"
    return f"`{field.default!r}`".replace("'", '"')


def below(kind: typing.Any) -> tuple[type | None, str]:
    """The dataclass that a field holds and what follows its name; None for a plain value."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return kind, ""
    inner = typing.get_args(kind)[:1] if typing.get_origin(kind) is tuple else ()
    if inner and dataclasses.is_dataclass(inner[0]):
        return inner[0], ".N"
    return None, ""


def section(cls: type, prefix: str, title: str, text: str = "") -> list[str]:
    """A table of the plain options of a dataclass, then a section for each dataclass in it."""
    kinds, words, later = typing.get_type_hints(cls), documented(cls), []
    lines = [f"## {title}", "", " ".join((cls.__doc__ or "").split()), ""]
    lines += [text] if text else []
    if prefix.endswith(".N."):
        lines += ["`N` counts from 0. A command line changes what the config lists, and adds none."]
        lines += [""]
    lines += ["| option | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(cls):
        inner, suffix = below(kinds[field.name])
        name = prefix + field.name.replace("_", "-")
        if inner:
            later.append((inner, f"{name}{suffix}.", f"`--{name}{suffix}.*`", words[field.name]))
            continue
        meaning = " ".join(filter(None, (words[field.name], choices(kinds[field.name]))))
        meaning = meaning.replace("|", "\\|")
        lines.append(f"| `--{name}` | {shown(field)} | {meaning} |")
    for inner, deeper, heading, about in later:
        lines += ["", *section(inner, deeper, heading, about + "\n" if about else "")]
    return lines


def page() -> str:
    """The whole page, as Markdown."""
    changeable = ", ".join(f"`{name}`" for name in CHANGEABLE)
    lines = HEAD.format(changeable=changeable).splitlines()
    lines += ["", *section(Config, "", "The run itself")]
    lines += ["", *section(Launch, "", "Where it is computed", LAUNCH)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
