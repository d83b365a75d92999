"""What a compiled program takes: memory, and the collectives of its schedule."""

import re
from dataclasses import dataclass
from math import prod

import jax

BYTES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}
COLLECTIVES = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"


@dataclass(frozen=True)
class Collective:
    """One collective of the schedule."""

    kind: str
    dtype: str
    bytes: int
    devices: int
    asynchronous: bool
    overlapped_flops: int
    overlapped_bytes: int
    times: int


@dataclass(frozen=True)
class Program:
    """Of one device; traffic and FLOPs of one step."""

    peak_bytes: int
    donated_bytes: int
    collectives: tuple[Collective, ...]
    matmul_flops: int
    attention_flops: int
    other_bytes: int


def read_program(compiled: jax.stages.Compiled) -> Program:
    """Reads a compiled program."""
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    text = compiled.as_text()
    devices = int(re.search(r"num_partitions=(\d+)", text)[1]) if "num_partitions" in text else 1
    found = []
    for line in text.splitlines():
        match = re.search(rf" = (.*?) ({COLLECTIVES})(-start)?\(", line)
        if not match:
            continue
        result, kind, start = match.groups()
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
        if start and kind != "all-reduce":
            half = len(arrays) // 2
            arrays = arrays[half:] if kind == "all-gather" else arrays[:half]
        size = sum(
            BYTES[dtype] * prod(int(n) for n in dims.split(",") if n) for dtype, dims in arrays
        )
        found.append(Collective(kind, arrays[0][0], size, devices, bool(start), 0, 0, 1))
    return Program(peak, memory.alias_size_in_bytes, tuple(found), 0, 0, 0)
