"""How files of a corpus become documents, in a fixed order, and a count of all that is left out."""

import dataclasses
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tinyllama_jax.errors import UserError, require

LARGEST_DOCUMENT = 2**24
"""Bytes of UTF-8 above which a document is refused: sentencepiece takes fifty times its size."""
LARGEST_LINE = 4 * LARGEST_DOCUMENT  # JSON writes a character in up to six
PARQUET_ROWS = 256  # read at once
READ_BYTES = 2**20

OnError = Literal["stop", "skip"]
RawDtype = Literal["uint16", "uint32"]

TOKEN_FILES = (".bin", ".npy")
"""Suffixes of files that hold token ids, see `token_files.py`."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Where a corpus keeps its documents."""

    splits: Mapping[str, str]
    """{split: glob of its files below the source folder}."""
    field: str = "text"
    """The field of a row that holds its text. Dots lead into nested fields, here and in `drop`."""
    drop: tuple[tuple[str, str], ...] = ()
    """(field, value): rows to leave out."""
    held_out_share: float = 0.0
    """Share of the documents of `train` that make its `validation`; see `is_held_out`."""
    raw_dtype: RawDtype | None = None
    """The dtype of token ids in files without a header; None: the files hold text."""

    @property
    def suffixes(self) -> Collection[str]:
        """The ends of the names of files that it reads."""
        return FORMATS if self.raw_dtype is None else TOKEN_FILES


# One in 200: a validation split that fills records from about 10 MB of text on.
SHARE = 0.005

CORPORA = {
    # Its code comes from StarCoder instead.
    "slimpajama": Corpus(
        {split: f"{split}/chunk*/*.jsonl.zst" for split in ("train", "validation", "test")},
        drop=(("meta.redpajama_set_name", "RedPajamaGithub"),),
    ),
    "starcoder": Corpus({"train": "*/*.parquet"}, "content", held_out_share=SHARE),
    # Give one of its subsets as the source, such as sample/10BT: they hold the same documents.
    "fineweb-edu": Corpus({"train": "**/*.parquet"}, held_out_share=SHARE),
    "tinystories": Corpus({s: f"data/{s}-*.parquet" for s in ("train", "validation")}),
    "files": Corpus({"train": "**/*"}, held_out_share=SHARE),
    # Files of validation, where there are some, take the place of the share; see `open_splits`.
    "tokens": Corpus({"train": "**/*"}, held_out_share=SHARE, raw_dtype="uint16"),
}


def is_held_out(text: bytes, share: float) -> bool:
    """Whether a document belongs to validation where a corpus has no such split of its own.

    The rule: the first 8 bytes of the sha256 of its UTF-8, over 2**64, are below `share`. It is a
    function of the text alone, so exact copies of a document all go to the same side. Documents
    that are only alike are not looked for.
    """
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") < share * 2**64


def list_files(corpus: Corpus, source: Path) -> tuple[dict[str, list[tuple[str, int]]], Counter]:
    """Returns ({split: [(name below `source`, bytes)] by name}, files of no known kind by suffix).

    Hidden files and folders are not looked at.

    Raises:
      UserError: no such folder, or no file for training or validation in it.
    """
    require(source.is_dir(), f"There is no folder {source}: give the corpus's as --source.")
    splits, unknown = {}, Counter()
    for split, pattern in corpus.splits.items():
        files = []
        for path in source.glob(pattern):
            name = path.relative_to(source).as_posix()
            if any(part.startswith(".") for part in name.split("/")) or not path.is_file():
                continue
            if suffix(name) in corpus.suffixes:
                files.append((name, path.stat().st_size))
            else:
                unknown[suffix(name)] += 1
        require(
            bool(files) or split == "test",
            f"{source} has no readable file {pattern} for the {split} split: give the folder that "
            "holds the corpus in its published layout as --source.",
        )
        if files:
            splits[split] = sorted(files)
    return splits, unknown


def suffix(name: str) -> str:
    """The end of a file's name that tells its format: `.jsonl.zst`, `.py`."""
    path = Path(name.lower())
    compressed = path.suffix in (".zst", ".gz")
    return Path(path.stem).suffix + path.suffix if compressed else path.suffix


class Tally:
    """What is left out, and why; and how far reading has come."""

    def __init__(self, on_error: OnError):
        self.on_error = on_error
        self.dropped: Counter[str] = Counter()  # documents, by the rule that leaves them out
        self.bad: dict[tuple[str, str], dict[str, Any]] = {}
        self.tokens: Counter[str] = Counter()  # of files of ids, by what the manifest calls them
        self.bytes_read = 0  # of the file that is being read

    def add_bad(self, file: str, reason: str, row: int | None = None, detail: str = "") -> None:
        """Counts a bad row, or all that is left of a bad file. Raises `UserError` if told to stop.

        Args:
          file: its name.
          reason: one of few, since they are counted.
          row: counted from 1; None: the rest of the file cannot be used.
          detail: more about the first of its kind.
        """
        if self.on_error == "stop":
            where = file if row is None else f"{file}, row {row},"
            raise UserError(
                f"{where} {reason}{detail and f' ({detail})'}: mend or remove it, or leave out and "
                "count what is bad with --on-error skip."
            )
        facts = {"file": file, "reason": reason, "rows": 0, "first_row": row, "detail": detail}
        self.bad.setdefault((file, reason), facts)["rows"] += row is not None


Rows = Iterator[tuple[int, list[Any] | str]]
"""(row from 1, values of the wanted fields), or a reason in place of the values."""


def read_documents(
    source: Path, file: str, corpus: Corpus, tally: Tally
) -> Iterator[tuple[str, bytes]]:
    """Yields (text, the same in UTF-8) of every document of a file, in its order.

    Memory stays flat but for the largest document. What is left out goes into the tally: bad rows
    and files; rows that `corpus.drop` names; documents without text.

    Raises:
      UserError: bad input where the tally says stop; a file that the system cannot read, always,
        since another try may read it.
    """
    fields = (corpus.field, *(field for field, _ in corpus.drop))
    read, path, rows = FORMATS[suffix(file)].read, source / file, 0
    tally.bytes_read = 0
    try:
        for rows, values in read(path, fields, tally):  # noqa: B007
            if isinstance(values, str):
                tally.add_bad(file, values, rows)
                continue
            text, *others = values
            rules = zip(corpus.drop, others, strict=True)
            if rule := next((rule for rule, value in rules if _as_text(value) == rule[1]), None):
                tally.dropped[f"{rule[0]} is {rule[1]}"] += 1
                continue
            if not isinstance(text, str):
                tally.add_bad(file, f"has a {corpus.field!r} of type {type(text).__name__}", rows)
                continue
            try:
                utf8 = text.encode()
            except UnicodeEncodeError:
                tally.add_bad(file, "holds half a surrogate pair", rows)
                continue
            if len(utf8) > LARGEST_DOCUMENT:
                tally.add_bad(file, TOO_LARGE, rows)
            elif not utf8:
                tally.dropped["no text"] += 1
            else:
                yield text, utf8
    except BadFile as error:
        tally.add_bad(file, str(error))
        return
    except (pa.ArrowException, OSError) as error:
        # Arrow's own have no number: the bytes are wrong, and will be next time.
        if getattr(error, "errno", None) or isinstance(error, MemoryError):
            raise UserError(
                f"{path} cannot be read ({error}): the same command goes on when it can."
            ) from None
        lines = str(error).splitlines() or [type(error).__name__]
        tally.add_bad(file, "is damaged or truncated", detail=f"after row {rows}: {lines[0]}")
        return
    if not rows:
        tally.add_bad(file, "is empty")


def _as_text(value: Any) -> str:
    """As a rule writes it: 3, true and null are no strings in a row, but are in a rule."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


class BadFile(Exception):
    """The rest of a file cannot be used; str() is the reason."""


TOO_LARGE = f"holds a document above {LARGEST_DOCUMENT:,} bytes"


def _read_jsonl(path: Path, fields: tuple[str, ...], tally: Tally, compression=None) -> Rows:
    with pa.OSFile(str(path)) as file:
        stream = pa.CompressedInputStream(file, compression) if compression else file
        lines = io.BufferedReader(stream, READ_BYTES)  # pyright: ignore[reportArgumentType]
        for row, line in enumerate(_lines(lines), start=1):
            tally.bytes_read = file.tell()
            if line is None:
                yield row, TOO_LARGE
            elif line.strip():
                yield row, _json_values(line, fields)


def _lines(file: io.BufferedReader) -> Iterator[bytes | None]:
    """The lines; None for one that memory should not hold."""
    while line := file.readline(LARGEST_LINE):
        if len(line) < LARGEST_LINE or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(LARGEST_LINE)
        yield None


def _json_values(line: bytes, fields: tuple[str, ...]) -> list[Any] | str:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return "is not UTF-8"
    except (ValueError, RecursionError):
        return "is not JSON"
    values = []
    for field in fields:
        value = row
        for name in field.split("."):
            if not isinstance(value, dict) or name not in value:
                return f"has no field {field!r}"
            value = value[name]
        values.append(value)
    return values


def _read_parquet(path: Path, fields: tuple[str, ...], tally: Tally) -> Rows:
    size = path.stat().st_size
    if not size:
        return
    # With a buffer, a row group is streamed; without one it is read as a whole.
    with pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
        roots = sorted({field.split(".")[0] for field in fields})
        for root in roots:
            if root not in file.schema_arrow.names:
                raise BadFile(f"has no column {root!r}")
        total, row = file.metadata.num_rows, 0
        for batch in file.iter_batches(PARQUET_ROWS, columns=roots, use_threads=False):
            columns = [_column(batch, field) for field in fields]
            for values in zip(*columns, strict=True):
                row += 1
                try:
                    yield row, [v.decode() if isinstance(v, bytes) else v for v in values]
                except UnicodeDecodeError:
                    yield row, "is not UTF-8"
            tally.bytes_read = size * row // total


def _column(batch: pa.RecordBatch, field: str) -> list[Any]:
    """The values of a field; strings as bytes, because Arrow does not check their UTF-8."""
    root, *names = field.split(".")
    column = batch.column(root)
    for name in names:
        kind = column.type
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            raise BadFile(f"has no column {field!r}")
        column = pc.struct_field(column, name)  # pyright: ignore[reportAttributeAccessIssue]
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    text = pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view
    if any(is_kind(column.type) for is_kind in text):
        column = column.cast(pa.large_binary())
    return column.to_pylist()


def _read_whole(path: Path, fields: tuple[str, ...], tally: Tally) -> Rows:
    """A file that is one document. It has no fields, so nothing of it is ever dropped."""
    with open(path, "rb") as file:
        data = file.read(LARGEST_DOCUMENT + 1)
    tally.bytes_read = len(data)
    if len(data) > LARGEST_DOCUMENT:
        raise BadFile(TOO_LARGE)
    try:
        yield 1, [data.decode(), *[None] * (len(fields) - 1)]
    except UnicodeDecodeError:
        yield 1, "is not UTF-8"


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file."""

    read: Callable[[Path, tuple[str, ...], Tally], Rows]
    record_bytes: float
    """See the function of this name."""


def _compressed(compression: str) -> Callable[[Path, tuple[str, ...], Tally], Rows]:
    return lambda path, fields, tally: _read_jsonl(path, fields, tally, compression)


def record_bytes(name: str) -> float:
    """Bytes of records that a byte of a file becomes, on the low side, to size the shards."""
    # Ids become uint16 mostly, and mostly were.
    return 1.0 if suffix(name) in TOKEN_FILES else FORMATS[suffix(name)].record_bytes


SOURCE_CODE = (
    "bash c cc cpp cs css cu cuh el ex f90 go h hpp hs html java jl js kt lisp lua m ml php "
    "pl proto ps1 py r rb rs scala sh sql swift tcl tex toml ts v vhdl yaml yml zig"
)

FORMATS = {
    ".jsonl": Format(_read_jsonl, 0.4),
    ".jsonl.zst": Format(_compressed("zstd"), 1.25),
    ".jsonl.gz": Format(_compressed("gzip"), 1.25),
    ".parquet": Format(_read_parquet, 1.25),
    **{f".{name}": Format(_read_whole, 0.4) for name in ("txt", "md", "rst", *SOURCE_CODE.split())},
}
