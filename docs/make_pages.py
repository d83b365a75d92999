"""Writes what follows from other files: docs/options.md from config.py, and the index of LOG.md.

    python docs/make_pages.py

tests/test_docs.py makes both again and compares, so that neither is ever behind its source.
"""

import ast
import dataclasses
import inspect
import re
import typing
from pathlib import Path

from tinyllama_jax.config import CHANGEABLE, Config, Launch

ROOT = Path(__file__).parents[1]
OPTIONS, LOG = ROOT / "docs/options.md", ROOT / "LOG.md"
HEAD = """\
# Which options does a training run have?

<!-- Written by docs/make_pages.py from tinyllama_jax/config.py: edit the docstrings there. -->

Every option stands in a config file (`configs/*.py`, which builds the dataclasses below) and can be
replaced on the command line: `--optimizer.peak-lr 1e-3` replaces `peak_lr` of the config's
`optimizer`. A yes-or-no option has two spellings, `--data.mask-documents` and
`--data.no-mask-documents`. The defaults below are those of the dataclasses; the shipped configs set
many of them otherwise, and `tinyllama train CONFIG --help` shows the values that hold for a
config. An unknown name, a wrong type or a value out of range is refused with an explanation before
anything is computed. [performance.md](performance.md) explains `--profile`, the one option of
`train` that is no part of a config.

A run that goes on in its folder must have the options that it began with, because all others
decide numbers that it has already made. It may change only these:
{changeable}.
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


def options_page() -> str:
    """The whole page of options, as Markdown."""
    changeable = ", ".join(f"`{name}`" for name in CHANGEABLE)
    lines = HEAD.format(changeable=changeable).splitlines()
    lines += ["", *section(Config, "", "The run itself")]
    lines += ["", *section(Launch, "", "Where it is computed", LAUNCH)]
    return "\n".join(lines) + "\n"


def anchor(heading: str) -> str:
    """The name under which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def indexed_log(log: str) -> str:
    """LOG.md with an index before its first entry, in place of the one that it may have."""
    head, first, entries = log.partition("\n## ")
    head = head.partition("\n- 20")[0]
    days: dict[str, list[str]] = {}
    for date, title in re.findall(r"^## (\S+): (.+)$", first + entries, re.MULTILINE):
        days.setdefault(date, []).append(f"[{title}](#{anchor(f'{date}: {title}')})")
    index = "".join(f"- {date}:\n  " + ";\n  ".join(links) + "\n" for date, links in days.items())
    return f"{head.rstrip()}\n\n{index}{first}{entries}"


if __name__ == "__main__":
    OPTIONS.write_text(options_page())
    LOG.write_text(indexed_log(LOG.read_text()))
