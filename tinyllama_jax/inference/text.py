"""Turns token ids that arrive a few at a time into text, up to a stop string.

A token may hold only a part of a character's bytes, and a later token may complete a stop string.
So text is shown only when no later token can change it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from sentencepiece import SentencePieceProcessor

# The character that sentencepiece decodes bytes to which form no character, or none yet.
UNFINISHED = "\ufffd"


class Continuation:
    """The text that continues a prompt. What was returned of it never changes by later ids."""

    def __init__(
        self, tokenizer: SentencePieceProcessor, prompt: Sequence[int], stops: Sequence[str] = ()
    ):
        """Begins an empty continuation.

        Args:
          tokenizer: decodes the ids.
          prompt: ids of the prompt.
          stops: strings of which the first to appear ends the text.
        """
        self._tokenizer, self._stops = tokenizer, stops
        self._ids = list(prompt)
        self.prompt = tokenizer.decode(self._ids).rstrip(UNFINISHED)
        self._shown = 0  # characters of the continuation that were returned

    def add(self, ids: Sequence[int], *, last: bool = False) -> str:
        """Adds ids and returns the text that can be shown because of them.

        Two things are held back at the end: bytes of a character that is not complete, and
        characters with which a stop string may begin. A stop string ends the text, and neither the
        string nor what follows it is returned.

        Args:
          ids: the new ids.
          last: whether no more ids will follow; nothing is held back then.
        """
        # All ids are decoded each time. Decoded alone, the new ones would lose the space before the
        # first of them, and bytes of one character in several tokens would not be joined.
        self._ids += ids
        text = self._tokenizer.decode(self._ids)[len(self.prompt) :]
        end = find_stop(text, self._stops)
        if end == len(text) and not last:
            end = len(text.rstrip(UNFINISHED))
            end -= _overlap(text[:end], self._stops)
        start, self._shown = self._shown, max(self._shown, end)
        return text[start:end]


def as_they_come(
    tokenizer: SentencePieceProcessor,
    prompts: Sequence[Sequence[int]],
    chunks: Iterable[list[list[int]]],
    stops: Sequence[str] = (),
) -> Iterator[str]:
    """Yields the text that a terminal shows of `generate.stream`.

    The first text appears as it is generated; the others follow as wholes when all are complete.

    Args:
      tokenizer: decodes the ids.
      prompts: ids of the prompts, which are shown before their continuations.
      chunks: what `generate.stream` yields for these prompts.
      stops: strings of which the first to appear ends a text.
    """
    texts = [Continuation(tokenizer, prompt, stops) for prompt in prompts]
    held = [text.prompt for text in texts]
    for new in chunks:
        held = [a + text.add(ids) for a, text, ids in zip(held, texts, new, strict=True)]
        yield held[0]
        held[0] = ""
    for index, text in enumerate(texts):
        yield "---\n" * (index > 0) + held[index] + text.add((), last=True) + "\n"


def find_stop(text: str, stops: Sequence[str]) -> int:
    """Returns where the first of the stop strings begins, or the text's length if there is none."""
    return min((start for start in map(text.find, stops) if start >= 0), default=len(text))


def make_stop(
    tokenizer: SentencePieceProcessor, stops: Sequence[str]
) -> Callable[[list[int]], bool] | None:
    """Makes the argument `stop` of `generate`, which ends a row whose new ids hold a stop string.

    Returns None if there are no stop strings.
    """
    if not stops:
        return None
    # The new ids are decoded after some other piece, here a newline, because sentencepiece drops
    # the space with which a text begins.
    before = [tokenizer.piece_to_id("<0x0A>")]

    def stop(new: list[int]) -> bool:
        text = Continuation(tokenizer, before).add(new, last=True)
        return find_stop(text, stops) < len(text)

    return stop


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Returns the length of the longest end of the text with which a stop string begins."""
    longest = max(map(len, stops), default=0)
    lengths = range(min(longest - 1, len(text)), 0, -1)
    return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in stops)), 0)
