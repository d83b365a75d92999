"""Reads disassembled machine code of NVIDIA GPUs: the inner loops, and what they ask of each unit.

Instructions are assigned to units as in Nsight Compute's Kernel Profiling Guide, "Pipelines". All
numbers are for one warp.
"""

import dataclasses
import re
from collections import Counter

from tinyllama_jax.errors import require

# Unit -> names of its instructions, up to the first dot.
_NAMES = {
    "tensor": "HMMA HGMMA",
    "MUFU": "MUFU F2F F2I I2F",
    "FP32": "FADD FFMA FMUL HADD2 HFMA2 HMUL2",
    "IMAD": "IMAD",
    "ALU": """BMSK F2FP FMNMX FSEL FSETP I2FP IABS IADD3 IMNMX ISETP LEA LOP3 MOV P2R PLOP3 PRMT R2P
        SEL SGXT SHF VIADD VIADDMNMX VIMNMX""",
    "shared": "LDS LDSM LDGSTS SHFL STS STSM",
    "uniform": """R2UR UBLKCP UBMSK UFLO UIADD3 UIMAD UISETP ULDC ULEA ULOP3 UMOV UPLOP3 UPRMT USEL
        USGXT USHF UTMALDG""",
    "other": """BAR BRA BSSY BSYNC CALL CS2R DEPBAR ELECT ERRBAR FENCE LDC LDG LDGDEPBAR MEMBAR NOP
        S2R S2UR STG SYNCS VOTE VOTEU WARPGROUP WARPSYNC YIELD""",
}
UNITS = {name: unit for unit, names in _NAMES.items() for name in names.split()}
LANES = 32


@dataclasses.dataclass
class Loop:
    """One iteration of a loop: its instructions by unit and by full name, the FLOP of the tensor
    cores, and the bytes that are read from or written to shared memory."""

    instructions: dict[str, int]
    names: dict[str, int]
    flop: int
    shared_bytes: int


def inner_loops(listing: str) -> list[Loop]:
    """Finds the innermost loops that use tensor cores, in the order of the listing.

    Raises:
      UserError: a loop has an instruction that is not in `UNITS`.
    """
    labels, lines = {}, []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            lines.append(instruction[1])
    spans = []
    for last, line in enumerate(lines):
        target = re.search(r"\bBRA.*\((\.L_\w+)\)", line)
        if target and labels.get(target[1], last + 1) <= last:
            body = lines[labels[target[1]] : last + 1]
            if any("MMA." in line for line in body):
                spans.append((labels[target[1]], last))
    inner = [
        (first, last)
        for first, last in spans
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans)
    ]
    return [_read(lines[first : last + 1]) for first, last in sorted(inner)]


def _read(body: list[str]) -> Loop:
    instructions, names, flop, shared_bytes = Counter(dict.fromkeys(_NAMES, 0)), Counter(), 0, 0
    for line in body:
        never = line.startswith("@!PT ")  # a placeholder, which is never executed
        name, _, operands = re.sub(r"^@!?U?P\w+\s+", "", line).partition(" ")
        base = name.split(".")[0]
        require(
            base in UNITS,
            f"{line}: which unit does {base} use? Add it to benchmarks/kernels/sass.py.",
        )
        instructions["other" if never else UNITS[base]] += 1
        names[name] += 1
        if UNITS[base] == "tensor":
            more_flop, size = _product(name, operands)
            flop += more_flop
            shared_bytes += size
        elif UNITS[base] == "shared" and not never:
            shared_bytes += LANES * _bytes_of_lane(base, name)
    return Loop(dict(instructions), dict(names), flop, shared_bytes)


def _product(name: str, operands: str) -> tuple[int, int]:
    """(FLOP, bytes read from shared memory) of one warp in a product of 2-byte numbers."""
    if wide := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.", name):  # four warps compute it together
        m, n, k = map(int, wide.groups())
        left_is_shared = operands.split(", ")[1].startswith("gdesc")
        return 2 * m * n * k // 4, 2 * k * (n + m * left_is_shared) // 4
    m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8)}[name.split(".")[1]]
    return 2 * m * n * k, 0


def _bytes_of_lane(base: str, name: str) -> int:
    """Bytes of shared memory that an instruction reads or writes for each lane."""
    if base in ("LDSM", "STSM"):  # one, two or four matrices of 8 x 8 numbers
        return 4 * int(re.search(r"\.([24])$", name)[1]) if name[-1] in "24" else 4
    wide = re.search(r"\.(64|128)\b", name)
    return int(wide[1]) // 8 if wide else 4
