"""`tinyllama generate`."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from tinyllama_jax.errors import ExitCode, require
from tinyllama_jax.inference.sampler import GREEDY, Sampler


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Continue prompts with a trained model."""

    path: Positional[Path]
    """A run folder, or a Hugging Face folder."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; give it several times for several texts, which are made together."""
    prompt_ids: tuple[int, ...] = ()
    """Token ids to continue, instead of text."""
    max_tokens: int = 64
    """New tokens of a text at most."""
    sampler: Annotated[Sampler, tyro.conf.arg(name="")] = GREEDY
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Ends a text before this string; may be given several times."""
    seed: int = 0
    """Seed of the first prompt's samples above temperature 0; the next prompt takes the next."""
    ids: bool = False
    """Print the new ids alone, a line for each prompt."""


def generate(options: GenerateOptions) -> int:
    """Prints what follows the prompts: text as it comes, or ids.

    Raises:
      UserError: no model there, no prompt, or one that fills the context.
    """
    import jax

    from tinyllama_jax.conversion import convert
    from tinyllama_jax.data.tokenizer import EOS, load_tokenizer
    from tinyllama_jax.inference import generate as inference
    from tinyllama_jax.inference.text import as_they_come, make_stop
    from tinyllama_jax.runtime.mesh import make_mesh

    prompt, stop = options.prompt, options.stop
    require(
        bool(prompt) != bool(options.prompt_ids),
        "Give either --prompt TEXT or --prompt-ids 1 5 9.",
    )
    require(all(stop), "--stop is empty: give a string, or leave it out.")
    model = convert.open_model(options.path)
    tokenizer = None
    if prompt or stop or not options.ids:  # ids alone need none
        tokenizer = load_tokenizer(options.path / "tokenizer.model")
    prompts = [tokenizer.encode(text) for text in prompt] if tokenizer else []
    prompts = prompts or [list(options.prompt_ids)]
    room = model.config.context - max(map(len, prompts))
    if 0 < room < options.max_tokens:
        print(f"The context of {model.config.context} holds {room} new tokens.", file=sys.stderr)
    how: dict[str, Any] = dict(
        max_tokens=options.max_tokens,
        sampler=options.sampler,
        seed=options.seed,
        eos=EOS,
        stop=make_stop(tokenizer, stop) if tokenizer else None,
    )
    # A device without a prompt would only need the weights too.
    mesh = make_mesh(devices=jax.devices()[: len(prompts)])
    weights = model.for_decoding(mesh)
    with jax.set_mesh(mesh):
        if options.ids:
            for new in inference.generate(model.config, weights, prompts, **how):
                print(*new)
        else:
            assert tokenizer
            chunks = inference.stream(model.config, weights, prompts, **how)
            for part in as_they_come(tokenizer, prompts, chunks, stop):
                print(part, end="", flush=True)
    return ExitCode.DONE
