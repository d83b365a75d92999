"""The order of training: a pure function of (seed, row), mixed exactly and sliced by process last.

The whole position in the data is one number, rows consumed; everything else is computed from it.
"""

import hashlib
import json
import math
from bisect import bisect
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import grain
import numpy as np
from grain.python import DatasetSelectionMap

from tinyllama_jax.config import DataConfig, to_json
from tinyllama_jax.data.format import read_manifest
from tinyllama_jax.data.rows import Rows
from tinyllama_jax.data.tokenizer import file_sha256
from tinyllama_jax.errors import require


class _Stretch:
    """A part of the global order in which the share of each source is constant, or a linear ramp.

    A share is an exact fraction, because a float's error would show after some 1e9 rows.
    """

    def __init__(
        self,
        start: int,
        shares: list[Fraction],
        slopes: list[Fraction],
        rows: int | None,
        ideal: list[Fraction],
        counts: list[int],
    ):
        self.start, self.shares, self.slopes = start, shares, slopes
        self.rows = rows  # length of a ramp; None: constant until the next stretch begins
        self.ideal, self.counts = ideal, counts  # rows of each source before `start`; see ideal_at
        # (share, slope) of each source and all sources after it together.
        zero = Fraction(0)
        self.left = [(sum(shares[i:], zero), sum(slopes[i:], zero)) for i in range(len(shares))]
        moves = zip(shares, slopes, strict=True)
        self.last = max(i for i, (share, slope) in enumerate(moves) if share > 0 or slope > 0)
        # Rounding goes on where the stretch before left it. Source 0 always can; another whose
        # rounding no carry in [0, 1) explains begins anew.
        half = Fraction(1, 2)
        carries = [exact + half - count for exact, count in zip(ideal, counts, strict=True)]
        self.carries = [carry if 0 <= carry < 1 else half for carry in carries]

    def taken(self, source: int, left: int) -> int:
        """Rows of a source among the first `left` that the sources before it leave here.

        The sources from this one on have the share a + b x at x rows into the stretch, so `left`
        of their rows have passed at the x where a x + b x^2 / 2 is `left`. The source's own share
        is s + d x, and what it took by then is the rounded s x + d x^2 / 2.
        """
        if source == self.last:
            return left
        a, b = self.left[source]
        s, d, carry = self.shares[source], self.slopes[source], self.carries[source]
        if self.rows is not None and left >= a * self.rows + b * self.rows**2 / 2:
            x = Fraction(self.rows)  # rounding may leave a row more than there are
        elif b == 0:
            x = left / a
        else:
            # x is (sqrt(a^2 + 2 b left) - a) / b; by its equation x^2 / 2 is (left - a x) / b.
            factor = (s - d * a / b) / b
            return _floor(d * left / b - a * factor + carry, factor, a**2 + 2 * b * left)
        return math.floor(s * x + d * x**2 / 2 + carry)

    def locate(self, row: int) -> tuple[int, int]:
        """See `Mixture.locate`."""
        left = row - self.start
        for source in range(self.last):
            before = self.taken(source, left)
            if self.taken(source, left + 1) > before:
                return source, self.counts[source] + before
            left -= before
        return self.last, self.counts[self.last] + left

    def counts_at(self, row: int) -> list[int]:
        """Rows of each source before a place of the global order: whole numbers, as read."""
        counts, left = list(self.counts), row - self.start
        for source in range(self.last + 1):
            taken = self.taken(source, left)
            counts[source] += taken
            left -= taken
        return counts

    def ideal_at(self, row: int) -> list[Fraction]:
        """The integral of each source's share up to a place: what `counts_at` rounds."""
        x = row - self.start
        return [
            ideal + share * x + slope * x**2 / 2
            for ideal, share, slope in zip(self.ideal, self.shares, self.slopes, strict=True)
        ]


def _floor(p: Fraction, q: Fraction, radicand: Fraction) -> int:
    """floor(p + q sqrt(radicand)), exactly."""
    square = q * q * radicand  # q sqrt(radicand) is the root of this, or its negative
    denominator = p.denominator * square.denominator
    under = square.numerator * square.denominator * p.denominator**2
    root = math.isqrt(under)
    if q < 0:
        root = -root - (root * root < under)
    return (p.numerator * square.denominator + root) // denominator


class Mixture:
    """The global order of training: which row of which source is read at each place.

    A place is answered in closed form, without walking there: by any place, the first source has
    given its share of all rows so far, the second its share of the rows that the first left over,
    and so on, where the integral of a share is rounded to whole rows. Therefore each source gives
    what its weight asks for, up to rounding:

    - With two sources, in any consecutive rows, wherever they begin, to within one row.
    - With more, in the rows from the first of the run on, to within one row for each source and
      for each stretch between two changes of the weights.

    A source whose weight is 0 is not read.
    """

    def __init__(
        self,
        weights: Sequence[float | Fraction],
        stages: Sequence[tuple[int, int, Sequence[float | Fraction]]] = (),
    ):
        """Builds the order from the sources' mixing weights and their changes during the run.

        Args:
          weights: mixing weight of each source from row 0 on; a source's share is its weight over
            the sum of all.
          stages: changes in their order, each (first row, rows of the linear ramp from the shares
            before, mixing weights after the ramp).
        """
        none, no_rows = [Fraction(0)] * len(weights), [0] * len(weights)
        self._stretches = [_Stretch(0, _shares(weights), none, None, none, no_rows)]
        for start, ramp, new_weights in stages:
            old, new = self._stretches[-1].shares, _shares(new_weights)
            if ramp > 0:
                slopes = [(b - a) / ramp for a, b in zip(old, new, strict=True)]
                self._begin_stretch(start, old, slopes, ramp)
            self._begin_stretch(start + ramp, new, none, None)

    def _begin_stretch(self, start: int, shares, slopes, rows: int | None) -> None:
        before = self._stretches[-1]
        if before.start == start:  # it has no rows
            self._stretches.pop()
        ideal, counts = before.ideal_at(start), before.counts_at(start)
        self._stretches.append(_Stretch(start, shares, slopes, rows, ideal, counts))

    def _stretch(self, row: int) -> _Stretch:
        return self._stretches[bisect(self._stretches, row, key=lambda at: at.start) - 1]

    def locate(self, row: int) -> tuple[int, int]:
        """(source, row of that source) at a place of the global order."""
        return self._stretch(row).locate(row)

    def counts(self, rows: int) -> list[int]:
        """Rows of each source among the first `rows` of the global order."""
        return self._stretch(rows).counts_at(rows)


def _shares(weights: Sequence[float | Fraction]) -> list[Fraction]:
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def make_mixture(data: DataConfig, context: int, fills: Sequence[Fraction] = ()) -> Mixture:
    """The order of a run: each stage begins with the row that holds its first token.

    Args:
      data: the sources, their mixing weights, and the stages. A stage begins after so many tokens
        of all rows, padding included.
      context: targets of a row.
      fills: for each source, the share of its targets that are not padding, 1 by default. Mixing
        weights are shares of tokens that are not padding, so a source with padding gives more rows.
    """

    def by_row(weights: Sequence[float]) -> list[Fraction]:
        full = fills or [Fraction(1)] * len(weights)
        return [Fraction(str(weight)) / fill for weight, fill in zip(weights, full, strict=True)]

    stages = []
    for stage in data.stages:
        first = stage.start_tokens // context
        ramp = (stage.start_tokens + stage.ramp_tokens) // context - first
        stages.append((first, ramp, by_row(stage.weights)))
    return Mixture(by_row([source.weight for source in data.sources]), stages)


def check_epochs(data: DataConfig, mixture: Mixture, sources: Sequence[Rows], rows: int) -> None:
    """Raises `UserError` if the first `rows` rows repeat a source more often than it allows."""
    for source, there, count in zip(data.sources, sources, mixture.counts(rows), strict=True):
        epochs = count / len(there)
        require(
            source.max_epochs is None or epochs <= source.max_epochs,
            f"The run would read {source.name} {epochs:.2f} times and its max_epochs is "
            f"{source.max_epochs}: lower its weight, train fewer steps, or prepare more of it.",
        )


class _ProcessOrder(DatasetSelectionMap):
    """Grain's selection map: the rows that one process reads, out of the global order."""

    def __init__(self, mixture: Mixture, start: int, batch: tuple[int, int], process, processes):
        self.mixture, self.start = mixture, start
        self.micro_batches, self.rows = batch
        self.process, self.local_rows = process, batch[1] // processes

    def __len__(self) -> int:
        return 2**62  # sources repeat for ever

    def __getitem__(self, index: int) -> tuple[int, int]:
        micro_batch, row = divmod(index, self.local_rows)
        first = micro_batch * self.rows + self.process * self.local_rows
        return self.mixture.locate(self.start + first + row)


def batches(
    sources: Sequence[Rows],
    mixture: Mixture,
    *,
    seed: int,
    start: int,
    micro_batches: int,
    rows: int,
    process: int = 0,
    processes: int = 1,
) -> Iterator[np.ndarray]:
    """Endless batches tokens_ABS of shape (micro_batches, rows / processes, context + 1).

    Args:
      sources: each is read in a fresh order every epoch, a pure function of (seed, source, epoch).
      mixture: the order in which the sources take turns.
      seed: the seed of the sources' orders.
      start: rows consumed before the first batch, over all processes; restoring is O(1).
      micro_batches: how many micro-batches make a batch.
      rows: rows of a micro-batch over all processes.
      process: the index of this process.
      processes: how many processes read, each its own rows of every micro-batch.
    """
    orders, ends = [], np.cumsum([len(source) for source in sources])
    for index, (source, end) in enumerate(zip(sources, ends.tolist(), strict=True)):
        order_seed = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
        numbers = grain.MapDataset.range(end - len(source), end)
        orders.append(numbers.shuffle(seed=order_seed).repeat())
    order = _ProcessOrder(mixture, start, (micro_batches, rows), process, processes)
    local_rows = rows // processes

    def read(numbers_R: np.ndarray) -> np.ndarray:
        """Rows by their number, when those of all sources are counted in a row."""
        sources_R = np.searchsorted(ends, numbers_R, side="right")
        rows_RS = np.empty((len(numbers_R), sources[0].context + 1), np.int32)
        for index, source in enumerate(sources):
            mine_R = sources_R == index
            if mine_R.any():
                rows_RS[mine_R] = source.read(numbers_R[mine_R] - (ends[index] - len(source)))
        return rows_RS

    dataset = grain.MapDataset.select_from_datasets(orders, order)
    # Numbers are batched and not rows, since many rows of a shard are read faster at once.
    dataset = dataset.batch(micro_batches * local_rows).map(read)
    prefetch = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    for batch in dataset.to_iter_dataset(prefetch):
        yield batch.reshape(micro_batches, local_rows, -1)


def ledger(
    names: Sequence[str], mixture: Mixture, sources: Sequence[Rows], rows: int
) -> dict[str, float]:
    """Metrics of what has been read after `rows` rows: rows, epochs and tokens of each source.

    Padding is no token; of a source that has some, as many as its mean row holds are counted.
    """
    context = sources[0].context
    metrics: dict[str, float] = {"data/tokens": 0}
    for name, source, count in zip(names, sources, mixture.counts(rows), strict=True):
        tokens = round(count * context * source.fill)
        metrics["data/tokens"] += tokens
        metrics[f"data/{name}/rows"] = count
        metrics[f"data/{name}/tokens"] = tokens
        metrics[f"data/{name}/epochs"] = count / len(source)
    return metrics


def fingerprint(data: DataConfig, context: int, seed: int) -> dict[str, Any]:
    """What must not change when a run goes on, since rows consumed would mean other rows.

    Raises:
      UserError: a source that was prepared with another tokenizer.
    """
    tokenizer = file_sha256(data.tokenizer)
    sources = {}
    for source in data.sources:
        manifest = read_manifest(source.path)
        # Another one of the same size would train as well, and tell wrong bits per byte and text.
        require(
            manifest["tokenizer"]["sha256"] == tokenizer,
            f"{source.path} was prepared with another tokenizer than {data.tokenizer}: "
            "give that one as --data.tokenizer, or prepare the source again.",
        )
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        sources[source.name] = {"weight": source.weight, "manifest": digest}
    stages = to_json(data)["stages"]
    return {
        "tokenizer": tokenizer,
        "seed": seed,
        "context": context,
        "sources": sources,
        "stages": stages,
    }
