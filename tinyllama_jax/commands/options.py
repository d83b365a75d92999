"""From a command line to the options dataclass of a verb."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated, TypeVar

import tyro

from tinyllama_jax.config import Config
from tinyllama_jax.config_file import installed_configs, load_config
from tinyllama_jax.errors import ExitCode, require

Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True)
class ConfigOptions:
    """The options of a verb whose command line names a config first, and may change any of it."""

    config: Annotated[Config, tyro.conf.arg(name="")]  # its options have no prefix


def read_options(options: type[Options], verb: str, argv: Sequence[str]) -> Options:
    """Reads the command line of a verb; ends the process where help is asked for.

    Args:
      options: dataclass to read. The first argument of a `ConfigOptions` names the config whose
        values are the defaults of the rest.
      verb: name of the verb, for messages.
      argv: what follows the verb.

    Raises:
      UserError: no config, or one that cannot be loaded.
      SystemExit: after help, with code 0, and after tyro's message on a mistake, with code 2.
    """
    prog = f"tinyllama {verb}"
    if not issubclass(options, ConfigOptions):
        return tyro.cli(options, args=argv, prog=prog)
    usage = f"{prog} CONFIG[:VARIANT] [--option value ...]"
    names = ", ".join(installed_configs())
    if argv and argv[0] in ("-h", "--help"):
        print(
            f"{usage}\n\n{_first_line(options)}\n\nCONFIG is a file, or one of {names}.\n"
            f"`{prog} CONFIG --help` tells its options."
        )
        sys.exit(ExitCode.DONE)
    require(
        bool(argv) and not argv[0].startswith("-"),
        f"Name a config first, a file or one of {names}: {usage}.",
    )
    values = {
        field.name: tyro.MISSING
        for field in dataclasses.fields(options)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    default = options(**values | {"config": load_config(argv[0])})
    return tyro.cli(options, default=default, args=argv[1:], prog=f"{prog} {argv[0]}")


def list_verbs(verbs: dict[str, type]) -> str:
    """The verbs, a line each, with what the docstrings of their options begin with."""
    return "\n".join(f"  {verb:10} {_first_line(options)}" for verb, options in verbs.items())


def _first_line(options: type) -> str:
    return (options.__doc__ or "").splitlines()[0]
