"""The one command `tinyllama`, its verbs and its exit codes."""

import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from tinyllama_jax.config import Config, Launch
from tinyllama_jax.config_file import load_config
from tinyllama_jax.errors import ExitCode, UserError, require
from tinyllama_jax.runtime.allocator import keep_memory, take_card

Corpus = Literal["slimpajama", "starcoder", "fineweb-edu", "tinystories", "files", "tokens"]


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """What `train` reads from the command line, under names without a prefix."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    launch: Annotated[Launch, tyro.conf.arg(name="")] = Launch()
    profile: str | None = None
    """START:STOP, steps to trace, as in 10:20: where their time goes is left in RUN/profile/."""


def train(argv: Sequence[str], devices: int | None = None) -> int:
    """Train CONFIG on the devices at hand, or go on with the run in its folder."""
    config = _config_first("train", argv)
    if config is None:
        return ExitCode.DONE
    options = tyro.cli(
        TrainOptions,
        default=TrainOptions(config),
        args=argv[1:],
        prog=f"tinyllama train {argv[0]}",
        description=Config.__doc__,
    )
    from tinyllama_jax.runtime import processes
    from tinyllama_jax.runtime.mesh import make_mesh
    from tinyllama_jax.training.loop import Diverged, run

    keep_memory()
    with processes.joined(options.launch, devices):
        mesh = make_mesh(options.launch.data_axis)
        _say_if_gpu_idle()
        try:
            return ExitCode.DONE if run(options.config, mesh, options.profile) else ExitCode.SAVED
        except Diverged as error:
            print(f"tinyllama: {error}", file=sys.stderr)
            return ExitCode.FAILED


def launch(devices: int | None = None) -> int:
    """What a launch script does: `train` with its command line, on this many devices in all."""
    return main(["train", *sys.argv[1:]], devices)


def _config_first(verb: str, argv: Sequence[str]) -> Config | None:
    """The config that the first argument names; None where help was asked for, and given."""
    usage = f"tinyllama {verb} CONFIG[:VARIANT] [--option value ...]"
    if argv and argv[0] in ("-h", "--help"):
        print(f"{usage}\n\nCONFIGs are in configs/; `tinyllama {verb} CONFIG --help` tells more.")
        return None
    require(bool(argv) and argv[0][:1] != "-", f"Name a config of configs/ first: {usage}.")
    return load_config(argv[0])


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Plan CONFIG on GPUs that need not be here; its own options are those of `train`."""

    mesh: str
    """CARD_COUNT: a100, a100_80g, h100 or h200, and how many, as in a100_16."""
    config: Annotated[Config, tyro.conf.arg(name="")]
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


def plan(argv: Sequence[str]) -> int:
    """Say what CONFIG takes on GPUs that need not be here: memory, time, money."""
    config = _config_first("plan", argv)
    if config is None:
        return ExitCode.DONE
    options = tyro.cli(
        PlanOptions,
        default=PlanOptions(mesh=tyro.MISSING, config=config),
        args=argv[1:],
        prog=f"tinyllama plan {argv[0]}",
    )
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
        found = make_plan(
            options.config,
            options.mesh,
            data_axis=options.data_axis,
            network=options.network,
            price=options.price,
            tokens=options.tokens,
            say=status.update,
        )
    if options.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        Console().print(render(found))
    return ExitCode.DONE if found.fits else ExitCode.DOES_NOT_FIT


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """For libraries that write to it before they know that they should not."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def tokenizer(
    files: Positional[tuple[str, ...]], /, *, vocab_size: int, out: Path = Path("tokenizer.model")
) -> int:
    """Train a sentencepiece tokenizer (BPE, byte fallback, Llama's ids).

    Args:
      files: Text files; the name `stdlib` stands for the embedded corpus (its training split).
      vocab_size: Number of pieces.
      out: Where the model goes.
    """
    from tinyllama_jax.data.tokenizer import train_tokenizer
    from tinyllama_jax.preparation.library import standard_library

    texts = []
    for file in files:
        if file == "stdlib":
            sources = standard_library().values()
            texts += [document.text for splits in sources for document in splits["train"]]
            continue
        try:
            texts.append(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read as UTF-8 text ({error}).") from None
    train_tokenizer(texts, vocab_size, out)
    print(f"{out}: {vocab_size:,} pieces")
    return ExitCode.DONE


def prepare(
    dataset: Positional[Literal["stdlib", Corpus]],
    /,
    *,
    tokenizer: Path,
    out: Path,
    source: Path | None = None,
    field: str | None = None,
    drop: tuple[str, ...] = (),
    dtype: Literal["uint16", "uint32"] | None = None,
    held_out: float | None = None,
    worker: str | None = None,
    processes: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    best_fit: int | None = None,
    runner: str | None = None,
    beam_options: tuple[str, ...] = (),
) -> int:
    """Turn raw text, or files of token ids, into datasets that `train` reads.

    Args:
      dataset: `stdlib`: the standard library of this Python, as two sources, prose and code.
        `files`: a folder of .jsonl, .jsonl.zst, .jsonl.gz, .parquet, .txt and source code.
        `tokens`: a folder of .bin and .npy files of ids of this tokenizer: TinyLlama's packed
        files, NumPy arrays, or ids without a header.
        The others: a folder in the layout in which that corpus is published.
      tokenizer: A sentencepiece model.
      out: Folder to make: the dataset, or for `stdlib` one subfolder each.
      source: Folder that holds the corpus.
      field: Of `files`: where a row has its text, `text` by default; dots lead further in.
      drop: Of `files`: FIELD=VALUE of rows to leave out.
      dtype: Of `tokens`: what ids in files without a header are, uint16 by default.
      held_out: Share of documents for validation where a corpus has none; 0.005 by default.
      worker: i/n: do the groups of files whose number mod n is i, on a cluster. All see --out; a
        call that finds no group missing joins them.
      processes: Processes on this machine; by default one a core, and one for `stdlib`.
      on_error: Bad input stops, or is left out and counted in the manifest.
      best_fit: Tokens of a row, the model's context: documents that fit one are never cut, and
        what is left of a row is padded. By default documents are concatenated.
      runner: Apache Beam does the groups, on this runner of its own; DirectRunner is this machine.
        Its workers see all paths as this process does.
      beam_options: NAME=VALUE of Beam's pipeline options, such as direct_num_workers=8
        direct_running_mode=multi_processing.
    """
    from tinyllama_jax.data.format import read_manifest
    from tinyllama_jax.preparation.corpus import open_corpus, parse_worker, prepare_corpus, summary
    from tinyllama_jax.preparation.library import prepare_standard_library
    from tinyllama_jax.preparation.workers import sigterm_as_interrupt

    if dataset == "stdlib":
        require(
            not (source or field or drop or dtype or worker or on_error == "skip")
            and not (held_out is not None or runner or beam_options),
            "`prepare stdlib` takes --tokenizer, --out, --processes and --best-fit: leave the rest "
            "out.",
        )
        try:
            with sigterm_as_interrupt():
                folders = prepare_standard_library(
                    tokenizer,
                    out,
                    processes=1 if processes is None else processes,
                    best_fit=best_fit,
                )
        except KeyboardInterrupt:
            print("Stopped; the same command goes on.", file=sys.stderr)
            return ExitCode.SAVED
        for name, folder in folders.items():
            print(f"{folder}: {name}, {summary(read_manifest(folder))}")
        return ExitCode.DONE
    require(source is not None, f"Give the folder that holds {dataset} as --source.")
    assert source
    try:
        with sigterm_as_interrupt():
            manifest = prepare_corpus(
                dataset.replace("-", "_"),  # TFDS's names have no hyphens
                open_corpus(dataset, field, drop, dtype, held_out),
                source,
                tokenizer,
                out,
                worker=parse_worker(worker) if worker else (0, 1),
                processes=processes,
                on_error=on_error,
                best_fit=best_fit,
                runner=runner,
                beam_options=beam_options,
            )
    except KeyboardInterrupt:
        print("Stopped; the same command goes on.", file=sys.stderr)
        return ExitCode.SAVED
    print(f"{out}: {summary(manifest) if manifest else 'groups of other workers are missing'}")
    return ExitCode.DONE


def verify(path: Positional[Path], /) -> int:
    """Check a dataset, a run or an export: hashes, counts, shapes, values.

    Args:
      path: A folder that `prepare`, `train` or `convert` made; or any Hugging Face Llama.
    """
    from tinyllama_jax.conversion import huggingface
    from tinyllama_jax.preparation.verify import verify_dataset
    from tinyllama_jax.runtime.checkpoint import is_run, verify_run

    if huggingface.is_hf_folder(path):
        bad = huggingface.verify_export(path)
    else:
        bad = verify_run(path) if is_run(path) else verify_dataset(path)
    for line in bad:
        print(f"{path}: {line}")
    if not bad:
        print(f"{path}: whole")
    return ExitCode.FAILED if bad else ExitCode.DONE


def convert(
    path: Positional[Path],
    out: Positional[Path],
    /,
    *,
    to: Literal["hf", "gguf"],
    step: int | Literal["all"] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_size: str | None = None,
    config: str | None = None,
    tokenizer: Path | None = None,
    check: bool = False,
) -> int:
    """Export a model for PyTorch or llama.cpp.

    Args:
      path: A run, a Hugging Face folder, or a .pth of the original TinyLlama.
      out: What to make, a folder or a .gguf; an earlier export is replaced.
      to: `hf`: a folder that transformers opens. `gguf`: a file for llama.cpp, in fp16.
      step: Checkpoint to take, the newest by default; `all`: each into a folder of its own below
        `out`, such as step-50k-token-105B.
      dtype: Of the weights in `hf`; float32 by default.
      max_shard_size: Of a file of weights in `hf`, such as 500MB; 5GB by default.
      config: Config with the model of a .pth, such as configs/tinyllama_1b.py.
      tokenizer: The tokenizer.model of a .pth, or of a Hugging Face folder that has none.
      check: Load it back with transformers and compare logits.
    """
    from tinyllama_jax.conversion import convert
    from tinyllama_jax.training.metrics import FILE, read_metrics

    require(
        to == "hf" or not (check or dtype or max_shard_size),
        "--check, --dtype and --max-shard-size are for --to hf: leave them out.",
    )
    max_shard_bytes = convert.parse_bytes(max_shard_size or "5GB")
    metrics = read_metrics(path) if (path / FILE).is_file() else {}
    if step == "all":
        require(not (config or tokenizer), f"{path}: --step all is for runs, which tell the rest.")
        models = convert.all_steps(path, out, to, metrics)
    else:
        models = [(convert.open_model(path, step, config, tokenizer, metrics), out)]
    passed = True
    for model, where in models:
        difference = convert.convert(model, where, to, dtype or "float32", max_shard_bytes, check)
        print(f"{where}: {model.config.parameters():,} parameters")
        if difference is not None:
            passed &= difference <= convert.TOLERANCE
            how = "within" if difference <= convert.TOLERANCE else "ABOVE"
            limit = f"({how} {convert.TOLERANCE:.0e})"
            print(f"largest logit difference to transformers: {difference:.2e} {limit}")
    return ExitCode.DONE if passed else ExitCode.FAILED


def generate(
    path: Positional[Path],
    /,
    *,
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    prompt_ids: tuple[int, ...] = (),
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    seed: int = 0,
    ids: bool = False,
) -> int:
    """Continue prompts with a trained model.

    Args:
      path: A run folder, or a Hugging Face folder.
      prompt: Text to continue; give it several times for several texts, which are made together.
      prompt_ids: Token ids to continue, instead of text.
      max_tokens: New tokens of a text at most.
      temperature: 0 takes the likeliest token each time.
      top_k: Sample from the k likeliest tokens alone; 0: from all.
      top_p: Sample from the likeliest tokens that together have this probability.
      stop: Ends a text before this string; may be given several times.
      seed: Of the samples at a temperature above 0; each further prompt takes the next number.
      ids: Print the new ids alone, a line for each prompt.
    """
    import jax

    from tinyllama_jax.conversion import convert
    from tinyllama_jax.data.tokenizer import EOS, load_tokenizer
    from tinyllama_jax.inference import generate as inference
    from tinyllama_jax.inference.text import as_they_come, make_stop
    from tinyllama_jax.runtime.mesh import make_mesh

    require(bool(prompt) != bool(prompt_ids), "Give either --prompt TEXT or --prompt-ids 1 5 9.")
    require(all(stop), "--stop is empty: give a string, or leave it out.")
    model = convert.open_model(path)
    # Ids alone need none.
    tokenizer = load_tokenizer(path / "tokenizer.model") if prompt or stop or not ids else None
    prompts = [tokenizer.encode(text) for text in prompt] if tokenizer else []
    prompts = prompts or [list(prompt_ids)]
    room = model.config.context - max(map(len, prompts))
    if 0 < room < max_tokens:
        print(f"The context of {model.config.context} holds {room} new tokens.", file=sys.stderr)
    options: dict[str, Any] = dict(
        max_tokens=max_tokens,
        sampler=inference.Sampler(temperature, top_k, top_p),
        seed=seed,
        eos=EOS,
        stop=make_stop(tokenizer, stop) if tokenizer else None,
    )
    # A device without a prompt would only need the weights too.
    mesh = make_mesh(devices=jax.devices()[: len(prompts)])
    weights = model.for_decoding(mesh)
    with jax.set_mesh(mesh):
        if ids:
            for new in inference.generate(model.config, weights, prompts, **options):
                print(*new)
        else:
            assert tokenizer
            chunks = inference.stream(model.config, weights, prompts, **options)
            for part in as_they_come(tokenizer, prompts, chunks, stop):
                print(part, end="", flush=True)
    return ExitCode.DONE


def evaluate(
    path: Positional[Path],
    /,
    *,
    tasks: tuple[str, ...],
    step: int | None = None,
    limit: int | None = None,
    include_path: Path | None = None,
) -> int:
    """Score a model by tasks of lm-evaluation-harness, which downloads data that is not here.

    Args:
      path: A run folder, which keeps the scores in results.json; or a Hugging Face folder.
      tasks: `commonsense` or `instruct`, the original's tasks; or names of lm-eval's or own ones.
      step: Checkpoint to take; the newest by default.
      limit: Only the first documents of each task.
      include_path: Folder of own task files.
    """
    import jax
    from rich.console import Console

    from tinyllama_jax.conversion import convert
    from tinyllama_jax.data.tokenizer import load_tokenizer
    from tinyllama_jax.evaluation import harness, scores
    from tinyllama_jax.runtime.mesh import auto_dtype, make_mesh, on_every_device

    require(limit is None or limit > 0, "--limit must be above 0.")
    model = convert.open_model(path, step)
    tokenizer = load_tokenizer(path / "tokenizer.model")
    mesh = make_mesh()
    dtype = auto_dtype(mesh)
    options: dict[str, Any] = dict(limit=limit, include_path=include_path)
    asked = harness.Tasks(tasks, model.config, tokenizer, mesh, dtype, **options)
    with jax.set_mesh(mesh):
        found = asked.score(on_every_device(model.weights, mesh, dtype))
    name = path.resolve().name
    if model.facts:  # of a run
        scores.write_results(path, model.facts.step, found, limit)
        name = f"step {model.facts.step}"
    Console().print(scores.render(name, found, tasks, limit))
    return ExitCode.DONE


def _say_if_gpu_idle() -> None:
    import jax

    if jax.default_backend() == "cpu" and os.path.exists("/dev/nvidia0"):
        print(
            "There is an NVIDIA device, but JAX runs on the CPU: "
            "pip install 'tinyllama-jax[gpu]' (or unset JAX_PLATFORMS)."
        )


VERBS = {
    "train": train,
    "plan": plan,
    "prepare": prepare,
    "tokenizer": tokenizer,
    "verify": verify,
    "convert": convert,
    "generate": generate,
    "eval": evaluate,
}


def main(argv: Sequence[str] | None = None, devices: int | None = None) -> int:
    """Runs one verb and returns its exit code; user errors become one line on stderr.

    Args:
      argv: the command line, the process's own by default.
      devices: how many `train` asks for; None: any number.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("tinyllama VERB ...\n")
        for name, verb in VERBS.items():
            print(f"  {name:10} {(verb.__doc__ or '').splitlines()[0]}")
        print("\ntinyllama VERB --help tells a verb's options.")
        return ExitCode.DONE if argv else ExitCode.USER_ERROR
    # What is meant: a folder opened for reading, a dataset without homepage, a metric's defaults.
    for library in ("absl", "lm_eval"):
        logging.getLogger(library).setLevel(logging.ERROR)
    take_card()  # whatever the verb: each may be what uses the GPU
    try:
        require(argv[0] in VERBS, f"There is no verb {argv[0]!r}: {', '.join(VERBS)}.")
        if argv[0] == "train":
            return train(argv[1:], devices)
        if argv[0] == "plan":
            return plan(argv[1:])
        return tyro.cli(VERBS[argv[0]], args=argv[1:], prog=f"tinyllama {argv[0]}")
    except UserError as error:
        print(f"tinyllama: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
