"""What a compiled step does, read off its schedule: memory, FLOPs, traffic and collectives.

The schedule is XLA's own text of the program (HLO): one computation after the other, each with its
instructions in the order in which a GPU is given them. Figures are of one device and one step.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax

from tinyllama_jax.model import attention

Kind = Literal["matmul", "attention", "memory", "optimizer", "communication"]

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
ITEM_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
    "token": 0,
}
# Instructions that name or order arrays and move nothing.
FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "iota"}
# Instructions that only run other computations.
CONTROL = {"while", "call", "conditional"}
OPTIMIZER_SCOPE = "optimizer"  # what step.py names the update by
# What the kernels of libraries, which name themselves, have in their names; the first that fits.
LIBRARY_KERNELS: tuple[tuple[Kind, str], ...] = (
    ("attention", r"fmha|sdpa|cudnn|flash"),
    ("matmul", r"nvjet|gemm|cutlass|xmma|cublas"),
    ("communication", r"nccl"),
    ("memory", r"(?i)^mem(cpy|set)"),
)
# Matrix products of T x T x H in each of our kernels, a head (Dao 2023, algorithms 1 and 2).
KERNEL_PRODUCTS = {"flash_forward": 2, "flash_dq": 3, "flash_dkdv": 4}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices."""

    kind: str
    """One of `COLLECTIVES`."""
    dtype: str
    """As HLO writes it: `bf16`, `f32`."""
    bytes: int
    """Of the whole arrays: what an all-gather gives, or a reduce-scatter takes."""
    devices: int
    """How many take part."""
    asynchronous: bool
    """Whether other work may run meanwhile."""
    overlapped_flops: int
    """Of matrix products and attention scheduled between its start and its end."""
    overlapped_bytes: int
    """Of all other memory traffic scheduled there."""
    times: int
    """How often a step runs it."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step."""

    peak_bytes: int | None
    """Memory at most, without what NCCL and cuBLAS take for themselves; None: it is not told, as of
    some programs that come from a cache on disk."""
    donated_bytes: int | None
    """Of arguments whose memory the results take over."""
    collectives: tuple[Collective, ...]
    """In the order of the schedule."""
    matmul_flops: int
    attention_flops: int
    """Of our kernels, with what their backward passes compute again, the causal half alone; or of
    the products of plain JAX."""
    other_bytes: int
    """Read and written by whatever is neither a matrix product nor attention."""
    optimizer_bytes: int
    """Of these, the optimizer's."""


def read_program(compiled: jax.stages.Compiled) -> Program:
    """Reads a program that was compiled for GPUs.

    Raises:
      ValueError: a loop whose number of rounds the compiler did not find out.
    """
    try:
        memory: Any = compiled.memory_analysis()
    except jax.errors.JaxRuntimeError:
        memory = None
    schedule = _Schedule(compiled.as_text() or "")
    work = schedule.work(schedule.entry)
    return Program(
        peak_bytes=memory
        and memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        donated_bytes=memory and memory.alias_size_in_bytes,
        collectives=tuple(schedule.collectives(schedule.entry, times=1)),
        matmul_flops=work.matmul_flops,
        attention_flops=work.attention_flops,
        other_bytes=work.other_bytes,
        optimizer_bytes=work.optimizer_bytes,
    )


def read_kinds(compiled: jax.stages.Compiled) -> tuple[str, dict[str, Kind]]:
    """The name of a program, and what each of its instructions that does something is, by name;
    kernels of our own in it go by theirs too.

    A fusion that holds a matrix product is one, and one that holds a part of the update belongs to
    the optimizer. `memory` is all that is of no other kind. Reads programs for CPUs too.
    """
    text = compiled.as_text() or ""
    schedule = _Schedule(text)
    kinds: dict[str, Kind] = {}
    for computation in schedule.computations.values():
        for instruction in computation.values():
            if (kind := schedule.kind(instruction)) is not None:
                kinds[instruction.name] = kind
                if kernel := instruction.attribute(r'\bname = "(\w+)"'):
                    kinds[kernel] = kind
    return text.split(maxsplit=2)[1].rstrip(","), kinds


def kernel_kind(kernel: str, kinds: Mapping[str, Kind]) -> Kind | None:
    """What a kernel of a GPU works on, by its name alone; None if that does not tell.

    Those that XLA compiles are named after an instruction, `loop_add_fusion_12` after
    `loop_add_fusion.12`, which all that compute the same share; ours have `__1` and so on behind
    their name where there are several.
    """
    for name in (kernel, re.sub(r"_(\d+)$", r".\1", kernel), re.sub(r"__\d+$", "", kernel)):
        if name in kinds:
            return kinds[name]
    return next((kind for kind, words in LIBRARY_KERNELS if re.search(words, kernel)), None)


def read_traffic(compiled: jax.stages.Compiled) -> list[tuple[str, int]]:
    """What is memory-bound in a program for GPUs, in the order of its schedule.

    Returns:
      (the name that JAX gives the operation, scopes and derivatives in it; bytes read and written a
      step) of each instruction: a fusion has the name of its last operation.
    """
    schedule = _Schedule(compiled.as_text() or "")
    return list(schedule.traffic(schedule.entry, times=1))


@dataclasses.dataclass(frozen=True)
class _Work:
    matmul_flops: int = 0
    attention_flops: int = 0
    other_bytes: int = 0
    optimizer_bytes: int = 0

    def __add__(self, other: "_Work") -> "_Work":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return _Work(*map(sum, pairs))

    def __mul__(self, times: int) -> "_Work":
        return _Work(*(times * value for value in dataclasses.astuple(self)))


Array = tuple[str, tuple[int, ...]]  # dtype and shape


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]  # its results
    operands: tuple[str, ...]
    line: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(map(_bytes, self.arrays))

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.line)
        return found and found[1]


def _bytes(array: Array) -> int:
    dtype, shape = array
    return ITEM_BYTES[dtype] * math.prod(shape)


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        (dtype, tuple(map(int, filter(None, dims.split(",")))))
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", text)
    )


class _Schedule:
    """The computations of a program."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        instructions = {}
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith(" "):
                instructions = {}
                words = line.removeprefix("ENTRY ").split()
                self.computations[name := words[0].lstrip("%")] = instructions
                if line.startswith("ENTRY "):
                    self.entry = name
            elif found := re.match(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)", line):
                root, name, result, opcode, rest = found.groups()
                operands = re.findall(r"%([\w.-]+)", rest[: rest.index(")")])
                instructions[name] = _Instruction(
                    name, opcode, _arrays(result), tuple(operands), line, bool(root)
                )

    def collectives(self, computation: str, times: int) -> Iterator[Collective]:
        """Those of a computation and of the loops in it."""
        instructions = list(self.computations[computation].values())
        for index, instruction in enumerate(instructions):
            kind = instruction.opcode.removesuffix("-start")
            if instruction.opcode == "while":
                body, trips = _loop(instruction)
                yield from self.collectives(body, times * trips)
            if instruction.opcode == "call":
                yield from self.collectives(_called(instruction), times)
            if kind not in COLLECTIVES:
                continue
            asynchronous = kind != instruction.opcode
            between = _Work()
            if asynchronous:
                for later in instructions[index + 1 :]:
                    if later.opcode == f"{kind}-done" and instruction.name in later.operands:
                        break
                    between += self._cost(computation, later)
            given = [self.computations[computation][name] for name in instruction.operands]
            # All but an all-gather give no more than they take.
            taken = sum(operand.bytes for operand in given)
            devices = _devices(instruction)
            yield Collective(
                kind=kind,
                dtype=given[0].arrays[0][0],
                bytes=taken * devices if kind == "all-gather" else taken,
                devices=devices,
                asynchronous=asynchronous,
                overlapped_flops=between.matmul_flops + between.attention_flops,
                overlapped_bytes=between.other_bytes,
                times=times,
            )

    def traffic(self, computation: str, times: int) -> Iterator[tuple[str, int]]:
        """Of the memory-bound instructions of a computation and of the loops in it."""
        for instruction in self.computations[computation].values():
            if instruction.opcode == "while":
                body, trips = _loop(instruction)
                yield from self.traffic(body, times * trips)
            elif instruction.opcode == "call":
                yield from self.traffic(_called(instruction), times)
            elif self.kind(instruction) in ("memory", "optimizer"):
                name = instruction.attribute(r'op_name="([^"]*)"') or instruction.opcode
                yield name, times * self._traffic(computation, instruction)

    @functools.cache  # noqa: B019 (a schedule lives for one reading)
    def work(self, computation: str) -> _Work:
        """What a computation does, its loops included."""
        costs = (self._cost(computation, i) for i in self.computations[computation].values())
        return sum(costs, start=_Work())

    def kind(self, instruction: _Instruction) -> Kind | None:
        """What an instruction is; None if it does nothing itself."""
        opcode = instruction.opcode
        if opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
            return "communication"
        # What an asynchronous instruction does is counted where it starts.
        if opcode in FREE | CONTROL or opcode.endswith("-done"):
            return None
        parts = list(self._parts(instruction))
        if products := [part for part in parts if _is_product(part)]:
            attends = all(_is_under(attention.SCOPE, part) for part in products)
            return "attention" if attends else "matmul"
        # JAX's call of cuDNN need not carry the scope.
        if "__cudnn$fmha" in instruction.line:
            return "attention"
        if any(_is_under(attention.SCOPE, part) for part in parts):
            return "attention"
        if any(_is_under(OPTIMIZER_SCOPE, part) for part in parts):
            return "optimizer"
        return "memory"

    def _parts(self, instruction: _Instruction) -> Iterator[_Instruction]:
        """An instruction, or what is inside a fusion."""
        fused = _fused(instruction)
        if fused is None:
            yield instruction
            return
        for other in self.computations[fused].values():
            yield from self._parts(other)

    def _cost(self, computation: str, instruction: _Instruction) -> _Work:
        if instruction.opcode == "while":
            body, trips = _loop(instruction)
            return self.work(body) * trips
        if instruction.opcode == "call":
            return self.work(_called(instruction))
        match self.kind(instruction):
            case "matmul":
                return _Work(matmul_flops=self._matmul_flops(computation, instruction))
            case "attention":
                flops = _kernel_flops(instruction) or self._matmul_flops(computation, instruction)
                return _Work(attention_flops=flops)
            case "memory":
                return _Work(other_bytes=self._traffic(computation, instruction))
            case "optimizer":
                traffic = self._traffic(computation, instruction)
                return _Work(other_bytes=traffic, optimizer_bytes=traffic)
        return _Work()

    def _matmul_flops(self, computation: str, instruction: _Instruction) -> int:
        """Of a matrix product, or of those inside a fusion."""
        if fused := _fused(instruction):
            inside = self.computations[fused].values()
            return sum(self._matmul_flops(fused, other) for other in inside)
        if not _is_product(instruction):
            return 0
        dims = instruction.attribute(r'lhs_contracting_dim(?:ension)?s"?[=:][{\["]*([\d,"]*)')
        left = self.computations[computation][instruction.operands[0]].arrays[0][1]
        contracted = [left[int(dim)] for dim in (dims or "").replace('"', "").split(",") if dim]
        return 2 * math.prod(instruction.arrays[0][1]) * math.prod(contracted)

    def _traffic(self, computation: str, instruction: _Instruction) -> int:
        """Bytes that an instruction reads and writes: of a slice, and of an update in place, the
        part alone."""
        if fused := _fused(instruction):
            inside = self.computations[fused]
            parameters = [i for i in inside.values() if i.opcode == "parameter"]
            root = next(i for i in inside.values() if i.is_root)
            results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
            read = sum(_read(inside, parameter) for parameter in parameters)
            return read + sum(_written(inside, result) for result in results)
        around = self.computations[computation]
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * instruction.bytes
        if instruction.opcode == "dynamic-update-slice":
            return 2 * around[instruction.operands[1]].bytes
        return instruction.bytes + sum(around[name].bytes for name in instruction.operands)


def _is_product(instruction: _Instruction) -> bool:
    return instruction.opcode == "dot" or "__cublas" in instruction.line


def _is_under(scope: str, instruction: _Instruction) -> bool:
    """Whether a `jax.named_scope` holds the instruction, or what it is a derivative of."""
    name = instruction.attribute(r'op_name="([^"]*)"') or ""
    return re.search(rf"[/(]{scope}[/)]", name) is not None


def _kernel_flops(instruction: _Instruction) -> int:
    """Of one of our attention kernels; 0 for all else."""
    for kernel, products in KERNEL_PRODUCTS.items():
        if instruction.opcode == "custom-call" and _is_under(kernel, instruction):
            # The queries are the largest of its arrays, with heads on axis 2.
            shapes = [shape for _, shape in _arrays(instruction.line) if len(shape) == 4]
            B, T, N, H = max(shapes, key=math.prod)
            return products * B * N * T * T * H
    return 0


def _fused(instruction: _Instruction) -> str | None:
    """The computation of a fusion; None for any other instruction."""
    if instruction.opcode not in ("fusion", "fusion-start"):
        return None
    return instruction.attribute(r"calls=%?([\w.-]+)")


def _through_bitcasts(inside: dict[str, _Instruction], name: str) -> str:
    while inside[name].opcode in ("bitcast", "copy", "reshape", "convert"):
        name = inside[name].operands[0]
    return name


def _read(inside: dict[str, _Instruction], parameter: _Instruction) -> int:
    """Of a fusion's parameter, what its uses read."""
    total = 0
    pending = [parameter.name]
    while pending:
        name = pending.pop()
        for user in inside.values():
            if name not in user.operands:
                continue
            if user.opcode == "bitcast":
                pending.append(user.name)
            elif user.opcode in ("dynamic-slice", "slice", "gather"):
                total += user.bytes
            elif user.opcode != "dynamic-update-slice" or name != user.operands[0]:
                return parameter.bytes
    return min(total, parameter.bytes)


def _written(inside: dict[str, _Instruction], result: _Instruction) -> int:
    """Of a fusion's result, what is not there already."""
    update = inside[_through_bitcasts(inside, result.name)]
    if update.opcode == "dynamic-update-slice":
        return inside[update.operands[1]].bytes
    return 0 if result.opcode == "parameter" else result.bytes


def _called(instruction: _Instruction) -> str:
    """The computation of a call: what the driver is given as one graph."""
    called = instruction.attribute(r"to_apply=%?([\w.-]+)")
    assert called is not None
    return called


def _loop(instruction: _Instruction) -> tuple[str, int]:
    """The body of a loop and its rounds."""
    body = instruction.attribute(r"body=%?([\w.-]+)")
    trips = instruction.attribute(r'known_trip_count":\{"n":"(\d+)"')
    if body is None or trips is None:
        raise ValueError(f"the compiler does not say how often {instruction.name} runs")
    return body, int(trips)


def _devices(instruction: _Instruction) -> int:
    """How many take part: HLO names them all, counts them, or names axes of a mesh."""
    groups = instruction.attribute(r"replica_groups=(.*?), [a-z_]+=") or ""
    if listed := re.match(r"\{\{([\d,]*)\}", groups):
        return len(listed[1].split(","))
    if counted := re.match(r"\[\d+,(\d+)\]", groups):
        return int(counted[1])
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
    axes = re.findall(r"'(\w+)'", groups.split("]")[-1])
    return math.prod(int(sizes[axis]) for axis in axes)
