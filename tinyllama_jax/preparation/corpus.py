"""How a corpus on disk becomes a dataset: the same bytes from any number of processes and machines.

Groups of input files are done in any order, by anyone who sees the folder; an interrupted
preparation goes on with those that are missing. When all are done, the shards get the names that
TFDS gives them, and the folder its own name.
"""

import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from tinyllama_jax.data.format import MANIFEST, RECORD, read_manifest, token_dtype
from tinyllama_jax.data.tokenizer import file_sha256, load_tokenizer
from tinyllama_jax.errors import UserError, require
from tinyllama_jax.files import make_folder, remove_leftovers, write_aside
from tinyllama_jax.preparation.groups import (
    GROUP_BYTES,
    PACKER_FACTS,
    Group,
    Preparation,
    make_groups,
    make_packer,
)
from tinyllama_jax.preparation.readers import CORPORA, Corpus, OnError, RawDtype, list_files
from tinyllama_jax.preparation.shards import shard_name, token_features, write_tfds_metadata
from tinyllama_jax.preparation.token_files import TOKEN_FACTS, open_splits
from tinyllama_jax.preparation.workers import run_groups

PLAN, LOCK = "plan.json", ".lock"  # of a folder that is not complete
AS_FOUND = "as found"
"""What the manifest says of bos and eos where the input is token ids, which keep theirs."""


def plan_corpus(preparation: Preparation, group_bytes: int) -> tuple[dict[str, Any], list[Group]]:
    """Returns (all that decides the bytes of the dataset, its groups).

    Raises:
      UserError: a bad tokenizer, a source folder that does not hold the corpus, or rows that do
        not fill a record.
    """
    corpus = preparation.corpus
    is_text = corpus.raw_dtype is None
    vocab_size = load_tokenizer(preparation.tokenizer).get_piece_size()
    make_packer(vocab_size, preparation.row_tokens)  # may complain here, before all else
    files, unknown = list_files(corpus, preparation.source)
    listed = [[split, name, size] for split in files for name, size in files[split]]
    plan = {
        "format": 1,
        "name": preparation.name,
        "source": {
            "files": len(listed),
            "bytes": sum(size for _, _, size in listed),
            "names_and_sizes_sha256": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
            "files_of_unknown_kind": dict(sorted(unknown.items())),
        },
        "field": corpus.field if is_text else None,
        "filters": [f"drop {field} = {value}" for field, value in corpus.drop],
        **({} if is_text else {"raw_dtype": corpus.raw_dtype}),
        "held_out_share": corpus.held_out_share,
        "packing": (
            {"kind": "concatenation"}
            if preparation.row_tokens is None
            else {"kind": "best fit", "row_tokens": preparation.row_tokens}
        ),
        "group_bytes": group_bytes,
        "tokenizer": {"sha256": file_sha256(preparation.tokenizer), "pieces": vocab_size},
        "bos": False if is_text else AS_FOUND,
        "eos": True if is_text else AS_FOUND,
        "record_tokens": RECORD + 1,
        "dtype": token_dtype(vocab_size).__name__,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("tinyllama-jax", "sentencepiece", "array-record", "pyarrow")
        },
    }
    return plan, make_groups(files, group_bytes)


def begin(preparation: Preparation, plan: dict[str, Any]) -> None:
    """Makes the folder of a preparation, or makes sure that it is this one's.

    Raises:
      UserError: the folder belongs to another preparation.
    """
    folder = preparation.folder
    make_folder(folder / "groups")
    remove_leftovers(folder)
    remove_leftovers(folder / "groups")
    text = json.dumps(plan, indent=2) + "\n"
    if not (folder / PLAN).is_file():
        write_aside(folder / PLAN, text, sync=True)
    require(
        (folder / PLAN).read_text() == text,
        f"{folder} was begun with other files, options, tokenizer or versions: remove it, or give "
        "another --out.",
    )


def missing_groups(preparation: Preparation, groups: Sequence[Group]) -> list[Group]:
    """The groups that are not done yet; none once the last step has begun."""
    missing = [group for group in groups if not preparation.is_done(group)]
    # Asked afterwards: the last step, maybe another worker's, moves what was looked for.
    joining = (preparation.folder / MANIFEST).is_file() or preparation.out.exists()
    return [] if joining else missing


def join_groups(
    preparation: Preparation, plan: dict[str, Any], groups: Sequence[Group]
) -> dict[str, Any]:
    """The last step: names, metadata and manifest, then the rename to `out`. Interrupt it anywhere.

    Returns:
      The manifest.

    Raises:
      UserError: a split without a record, or a shard that is gone.
    """
    folder, out = preparation.folder, preparation.out
    try:
        lock = open(folder / LOCK, "w")
    except FileNotFoundError:  # another worker renamed the folder meanwhile
        return open_finished(plan, out)
    with lock:
        _wait_for_lock(lock, folder)
        if not folder.exists():
            return open_finished(plan, out)
        # Written first: from here on no group is missing, though its shards move.
        manifest = _manifest(preparation, plan, groups)
        write_aside(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n", sync=True)
        for split, facts in manifest["splits"].items():
            for shard in facts["shards"]:
                waiting = preparation.shard(groups[shard["group"]], split)
                if waiting.exists():
                    waiting.rename(folder / shard["file"])
        read_manifest(folder)  # every shard is there
        features = token_features(plan["tokenizer"]["pieces"])
        write_tfds_metadata(folder, preparation.name, features, manifest["splits"])
        folder.rename(out)
    return open_finished(plan, out)


def _wait_for_lock(lock: TextIO, folder: Path) -> None:
    """Holds the last step against other workers that see, too, that nothing is missing."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be locked ({error.strerror}): give an --out on a file system that "
            "has locks."
        ) from None


def open_finished(plan: dict[str, Any], out: Path) -> dict[str, Any]:
    """The manifest of the dataset at `out`; removes what only its preparation needed.

    Raises:
      UserError: `out` is no dataset, a damaged one, or one made from something else.
    """
    require(
        (out / MANIFEST).is_file(),
        f"{out} is there already and no dataset: remove it, or give another --out.",
    )
    there = read_manifest(out)
    require(
        all(there.get(key) == plan[key] for key in plan if key != "versions"),
        f"{out} holds a dataset made from other files, options or tokenizer: "
        "remove it, or give another --out.",
    )
    shutil.rmtree(out / "groups", ignore_errors=True)
    remove_leftovers(out)
    for name in (PLAN, LOCK):
        (out / name).unlink(missing_ok=True)
    return there


def _manifest(
    preparation: Preparation, plan: dict[str, Any], groups: Sequence[Group]
) -> dict[str, Any]:
    sidecars = [json.loads(preparation.sidecar(group).read_text()) for group in groups]
    splits, dropped = {}, {}
    corpus_splits = dict.fromkeys([group.split for group in groups])
    for split in (*corpus_splits, *(("validation",) if preparation.corpus.held_out_share else ())):
        shards = [
            (index, sidecar["shards"][split])
            for index, sidecar in enumerate(sidecars)
            if split in sidecar["shards"]
        ]
        counts = {
            fact: sum(sidecar[fact].get(split, 0) for sidecar in sidecars) for fact in PACKER_FACTS
        }
        require(
            bool(shards),
            f"{preparation.name}/{split} has {counts['dropped_tokens']:,} tokens in groups of "
            f"fewer than the {RECORD + 1:,} of one record: give more text"
            + " or a larger --held-out" * (split not in corpus_splits)
            + f", and remove {preparation.folder}.",
        )
        records = sum(shard["records"] for _, shard in shards)
        splits[split] = {
            **counts,
            "fill_rate": 1 - counts["padding_tokens"] / (records * RECORD),
            "records": records,
            "tokens": records * (RECORD + 1),
            "shards": [
                shard
                | {
                    "file": shard_name(preparation.name, split, index, len(shards)),
                    "group": group,
                    "documents": sidecars[group]["documents"][split],
                    "first_input": groups[group].files[0][0],
                    "last_input": groups[group].files[-1][0],
                }
                for index, (group, shard) in enumerate(shards)
            ],
        }
    for sidecar in sidecars:
        for rule, count in sidecar["dropped"].items():
            dropped[rule] = dropped.get(rule, 0) + count
    bad = [facts for sidecar in sidecars for facts in sidecar["bad"]]
    read = {
        fact: sum(sidecar[fact] for sidecar in sidecars)
        for fact in ("text_bytes", *TOKEN_FACTS)
        if all(fact in sidecar for sidecar in sidecars)
    }
    return plan | read | {"skipped": {"dropped": dropped, "bad": bad}, "splits": splits}


def prepare_corpus(
    name: str,
    corpus: Corpus,
    source: Path,
    tokenizer: Path,
    out: Path,
    *,
    worker: tuple[int, int] = (0, 1),
    processes: int | None = None,
    on_error: OnError = "stop",
    best_fit: int | None = None,
    runner: str | None = None,
    beam_options: Sequence[str] = (),
    group_bytes: int = GROUP_BYTES,
) -> dict[str, Any] | None:
    """Prepares a corpus as the dataset `out`, or goes on with it, or leaves it alone if complete.

    Args:
      name: the name that TFDS gives the dataset.
      corpus: the layout of the corpus.
      source: the folder of the corpus.
      tokenizer: path of a sentencepiece model.
      out: folder to make. Until it is complete, all is in `out.partial` beside it.
      worker: (i, n): of n workers, this one does the groups whose index mod n is i.
      processes: how many this worker starts; by default one for each core that it may use.
      on_error: what to do with bad input, see `Tally`.
      best_fit: tokens of the rows into which documents are packed whole, with padding; by default
        they are concatenated.
      runner: a runner of Apache Beam, which does the groups instead; see `beam.make_pipeline`.
      beam_options: options of Beam's pipeline.
      group_bytes: see `make_groups`.

    Returns:
      The manifest, or None if groups of other workers are missing.

    Raises:
      UserError: all that `write_group`, `plan_corpus`, `begin`, `join_groups` and `make_pipeline`
        raise; Beam that is not installed, or that gets options without a runner.
    """
    index, workers = worker
    label = "" if workers == 1 else f"-{index}-of-{workers}"
    driver = functools.partial(run_groups, processes=processes, label=label)
    if runner or beam_options:
        require(
            workers == 1 and processes is None,
            "--runner has workers of its own: leave out --worker and --processes.",
        )
        driver = _beam_driver(runner, beam_options)
    if corpus.raw_dtype is not None:
        require(best_fit is None, "--best-fit is for text: ids are taken in the order they have.")
        corpus = open_splits(corpus, source)
    preparation = Preparation(name, corpus, source, tokenizer, out, on_error, best_fit)
    plan, groups = plan_corpus(preparation, group_bytes)
    if out.exists():
        return open_finished(plan, out)
    begin(preparation, plan)
    mine = [g for g in missing_groups(preparation, groups) if g.index % workers == index]
    driver(preparation, mine)
    if missing_groups(preparation, groups):
        return None
    return join_groups(preparation, plan, groups)


def _beam_driver(
    runner: str | None, options: Sequence[str]
) -> Callable[[Preparation, Sequence[Group]], None]:
    require(runner is not None, "--beam-options are for a --runner: name one.")
    assert runner
    logging.disable(logging.WARNING)  # Beam misses Google's libraries, which need not be here
    try:
        from tinyllama_jax.preparation import beam

        return functools.partial(beam.run_groups, beam.make_pipeline(runner, options))
    except ModuleNotFoundError as error:
        raise UserError(
            f"--runner needs Apache Beam ({error}): pip install 'tinyllama-jax[beam]'."
        ) from None
    finally:
        logging.disable(logging.NOTSET)


def parse_worker(text: str) -> tuple[int, int]:
    """`2/8` is (2, 8). Raises `UserError` unless it is i/n with 0 <= i < n."""
    index, _, workers = text.partition("/")
    good = index.isdecimal() and workers.isdecimal() and int(index) < int(workers)
    require(good, f"--worker is {text!r}: give i/n, from 0/n to (n-1)/n.")
    return int(index), int(workers)


def open_corpus(
    name: str,
    field: str | None,
    drop: Sequence[str],
    dtype: RawDtype | None = None,
    held_out: float | None = None,
) -> Corpus:
    """A row of `CORPORA`, with what the user gives of it.

    Args:
      name: the key of the row.
      field: the field that holds the text, if given.
      drop: "FIELD=VALUE" of rows to leave out.
      dtype: the dtype of token ids in files without a header, if given.
      held_out: the share of the documents for validation, if given.

    Raises:
      UserError: fields for a corpus that has none or its own, a dtype for text, a share for a
        corpus with a validation split or that is none, or a rule without `=`.
    """
    corpus = CORPORA[name]
    require(
        name == "files" or not (field or drop),
        f"--field and --drop are for `prepare files`, not for {name}: leave them out.",
    )
    require(
        name == "tokens" or not dtype,
        f"--dtype is for `prepare tokens`, not for {name}: leave it out.",
    )
    require(
        held_out is None or corpus.held_out_share > 0,
        f"{name} has a validation split of its own: leave --held-out out.",
    )
    require(
        held_out is None or 0 < held_out < 1,
        f"--held-out is {held_out}: give a share between 0 and 1, such as 0.05.",
    )
    rules = []
    for rule in drop:
        key, equals, value = rule.partition("=")
        require(bool(key and equals), f"--drop is {rule!r}: give FIELD=VALUE.")
        rules.append((key, value))
    return dataclasses.replace(
        corpus,
        field=field or corpus.field,
        drop=(*corpus.drop, *rules),
        raw_dtype=dtype or corpus.raw_dtype,
        held_out_share=held_out or corpus.held_out_share,
    )


def summary(manifest: dict[str, Any]) -> str:
    """A dataset in one line: tokens of each split, and what was left out."""
    parts = []
    for split, facts in manifest["splits"].items():
        parts.append(f"{split} {facts['tokens']:,} tokens")
        if facts["padding_tokens"]:
            parts[-1] += f" ({1 - facts['fill_rate']:.2%} padding)"
    if manifest["eos"] == AS_FOUND:
        parts.append(f"{manifest['bos_tokens']:,} bos and {manifest['eos_tokens']:,} eos found")
        if manifest["tokens_without_text"]:
            parts.append(f"{manifest['tokens_without_text']:,} bos and eos without text dropped")
    skipped = manifest["skipped"]
    parts += [f"{count:,} documents dropped: {why}" for why, count in skipped["dropped"].items()]
    if skipped["bad"]:
        parts.append(f"BAD INPUT in {len(skipped['bad'])} places, see skipped in {MANIFEST}")
    if unknown := manifest["source"]["files_of_unknown_kind"]:
        parts.append(f"{sum(unknown.values()):,} files of unknown kinds not read")
    return ", ".join(parts)
