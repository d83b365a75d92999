"""Configs on disk: Python files such as those of configs/, and the config.json of a run."""

import dataclasses
import json
import runpy
import traceback
from pathlib import Path
from typing import Any

from tinyllama_jax.config import Config, LlamaConfig
from tinyllama_jax.errors import UserError, require

# A link to the repository's configs/, which an installation holds as files.
INSTALLED = Path(__file__).parent / "configs"


def installed_configs() -> list[str]:
    """Names of the configs that come with the package: `demo` for configs/demo.py."""
    return sorted(path.stem for path in INSTALLED.glob("*.py"))


def load_config(path: str) -> Config:
    """Runs a config file and returns what its `get_config()` gives, or the variant's function.

    Args:
      path: `FILE`, or `FILE:FUNCTION` for a variant. Where there is no such file, FILE may be a
        name of `installed_configs`.

    Raises:
      UserError: no such file, one that does not run, or no such function in it.
    """
    name = "get_config"
    if not Path(path).is_file() and ":" in path:
        path, _, name = path.rpartition(":")
    if not Path(path).is_file() and path in installed_configs():
        path = str(INSTALLED / f"{path}.py")
    require(
        Path(path).is_file(),
        f"There is no config file {path!r}: give the path of one, or a name that is installed "
        f"({', '.join(installed_configs())}).",
    )
    try:
        get_config = runpy.run_path(path).get(name)
        if not callable(get_config):
            raise UserError(f"{path} defines no {name}() -> Config.")
        config = get_config()
    except UserError:
        raise
    except Exception as error:  # whatever its author's mistake raises
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        if isinstance(error, SyntaxError):
            lines.append(error.lineno)
        line = f" line {lines[-1]}" if lines and lines[-1] else ""
        raise UserError(
            f"{path}{line} is no proper config ({type(error).__name__}: {error}): mend it, or "
            "begin with a copy of one in configs/."
        ) from error
    if not isinstance(config, Config):
        raise UserError(f"{name}() of {path} gives no Config, but {config!r}.")
    return config


def model_of_run(run: Path) -> LlamaConfig:
    """The model of the run in a folder.

    Raises:
      UserError: no run there, or its config.json is damaged.
    """
    require(
        (run / "config.json").is_file(),
        f"{run} is no run: give a folder that `tinyllama train` wrote.",
    )
    try:
        return LlamaConfig(**json.loads((run / "config.json").read_text())["model"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{run / 'config.json'} is damaged: the command that trained the run writes it anew."
        ) from None


# Options that earlier versions had. They decided no number of a run, so one that was begun with
# them goes on without.
REMOVED = {"unroll_layers"}


def with_defaults(saved: Any, config: Any) -> Any:
    """The JSON of a run's config, with the options that came after it at their defaults.

    Args:
      saved: what `to_json` gave for the config, or a part of it, when the run was begun.
      config: the same part now.
    """
    if isinstance(saved, list) and isinstance(config, tuple):
        parts = zip(saved, config, strict=False)
        return [with_defaults(old, new) for old, new in parts] + saved[len(config) :]
    if not (isinstance(saved, dict) and dataclasses.is_dataclass(config)):
        return saved
    whole = {name: value for name, value in saved.items() if name not in REMOVED}
    for field in dataclasses.fields(config):
        if field.name in saved:
            whole[field.name] = with_defaults(saved[field.name], getattr(config, field.name))
        elif field.default is not dataclasses.MISSING:
            default = json.dumps(field.default, default=dataclasses.asdict)
            whole[field.name] = json.loads(default)
    return whole
