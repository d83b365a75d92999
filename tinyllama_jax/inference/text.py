"""Text whose ids arrive by and by: whole characters, up to a stop string."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from sentencepiece import SentencePieceProcessor

# What sentencepiece makes of bytes that are no character, or not yet.
UNFINISHED = "\ufffd"


class Continuation:
    """The text after a prompt. What was shown of it stays true, whatever ids follow."""

    def __init__(
        self, tokenizer: SentencePieceProcessor, prompt: Sequence[int], stops: Sequence[str] = ()
    ):
        self._tokenizer, self._stops = tokenizer, stops
        self._ids = list(prompt)
        self.prompt = tokenizer.decode(self._ids).rstrip(UNFINISHED)
        self._shown = 0

    def add(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The text that further ids bring; with `last` nothing is held back for what may follow.

        Held back are the bytes of a character that is not whole, and what a stop string may begin
        with. A stop string ends the text, and neither it nor what follows is shown.
        """
        # All ids each time: sentencepiece gives the first piece no space, and joins bytes.
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
    """What a terminal shows of `generate.stream`: the first text by pieces, then the others."""
    texts = [Continuation(tokenizer, prompt, stops) for prompt in prompts]
    held = [text.prompt for text in texts]
    for new in chunks:
        held = [a + text.add(ids) for a, text, ids in zip(held, texts, new, strict=True)]
        yield held[0]
        held[0] = ""
    for index, text in enumerate(texts):
        yield "---\n" * (index > 0) + held[index] + text.add((), last=True) + "\n"


def find_stop(text: str, stops: Sequence[str]) -> int:
    """Where the first of the stop strings begins; the length of the text if it holds none."""
    return min((at for at in map(text.find, stops) if at >= 0), default=len(text))


def make_stop(
    tokenizer: SentencePieceProcessor, stops: Sequence[str]
) -> Callable[[list[int]], bool] | None:
    """The `stop` of `generate`: do the new ids of a row spell a stop string? None without any."""
    if not stops:
        return None
    # Some piece in front keeps the space that the first new one may begin with.
    before = [tokenizer.piece_to_id("<0x0A>")]

    def stop(new: list[int]) -> bool:
        text = Continuation(tokenizer, before).add(new, last=True)
        return find_stop(text, stops) < len(text)

    return stop


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of the text that some stop string begins with."""
    longest = max(map(len, stops), default=0)
    lengths = range(min(longest - 1, len(text)), 0, -1)
    return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in stops)), 0)
