"""Reads event files back without TensorBoard: the other half of what tensorboardX wrote."""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """{(name, step): value} of all event files, later ones last."""
    found = {}
    for path in sorted(folder.glob("events.*")):
        content, place = path.read_bytes(), 0
        while place < len(content):
            # A record: its length (8 bytes), a checksum (4), the event, a checksum (4).
            (length,) = struct.unpack_from("<Q", content, place)
            event = Event.FromString(content[place + 12 : place + 12 + length])
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
            place += length + 16
    return found
