"""`tinyllama plan`."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator

from tinyllama_jax.commands.options import ConfigOptions
from tinyllama_jax.errors import ExitCode


@dataclasses.dataclass(frozen=True)
class PlanOptions(ConfigOptions):
    """Say what CONFIG takes on GPUs that need not be here: memory, time, money.

    CONFIG's own options are those of `train`.
    """

    mesh: str
    """CARD_COUNT: a100, a100_80g, h100 or h200, and how many, as in a100_16."""
    data_axis: int = 1
    """Groups of devices that each hold the whole state."""
    network: float = 400
    """Gb/s into, and out of, a node of 8 GPUs."""
    price: float | None = None
    """Dollars a GPU hour."""
    tokens: dict[str, float] = dataclasses.field(default_factory=dict)
    """Tokens of sources whose datasets are not here: slimpajama 6e11 starcoder 3e11."""
    json: bool = False
    """JSON on stdout, instead of tables."""


def plan(options: PlanOptions) -> int:
    """Prints the plan, and returns whether the step fits the card.

    Raises:
      UserError: no such card, or a config that such a mesh cannot train.
    """
    # A laptop's compiler is asked, not its devices; XLA's warnings are for those who run programs,
    # and naming the frames of its stack traces takes it 20 s.
    os.environ |= {"JAX_PLATFORMS": "cpu", "LLVM_DISABLE_SYMBOLIZATION": "1"}
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    with _silent_stderr():
        import jax

        jax.devices()
    from rich.console import Console

    from tinyllama_jax.planning.plan import plan as make_plan
    from tinyllama_jax.planning.plan_table import render

    with Console(stderr=True, quiet=options.json).status("reading the config") as status:
        planned = make_plan(
            options.config,
            options.mesh,
            data_axis=options.data_axis,
            network=options.network,
            price=options.price,
            tokens=options.tokens,
            say=status.update,
        )
    if options.json:
        print(json.dumps(planned.to_json(), indent=2))
    else:
        Console().print(render(planned))
    return ExitCode.DONE if planned.fits else ExitCode.DOES_NOT_FIT


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Closes stderr to libraries that write to it before they know that they should not."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
