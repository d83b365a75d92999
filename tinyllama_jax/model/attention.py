"""Causal grouped-query attention: one contract, four backends, and decoding beside it.

Shapes: B batch, T query length, S key length, N query heads, K kv heads, G = N / K, H head width.
"""

import functools
import importlib
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tinyllama_jax.config import AttentionBackend
from tinyllama_jax.model.flash_attention import HEAD_WIDTHS, flash_attention, padded_width
from tinyllama_jax.model.tiles import TILES

# What a device calls itself -> the chip that its kernels are tuned for.
CHIPS = {"A100": "A100", "H100": "H100", "H200": "H100"}
COMPUTE_CAPABILITY = {"A100": 80, "H100": 90}
LOWEST = jnp.finfo(jnp.float32).min  # a row without any visible key stays finite
SCOPE = "attend"  # what each operation of `attention` is named under in a compiled program

# (chip, documents) -> what `auto` takes there, and why.
AUTO: dict[tuple[str, bool], tuple[AttentionBackend, str]] = {
    ("A100", False): ("pallas", "gives the same bits twice; cuDNN was not measured on this chip"),
    ("A100", True): ("pallas", "skips what documents do not see, which cuDNN cannot do"),
    ("H100", False): ("cudnn", "402 TFLOP/s forward, the fastest one measured on this chip"),
    ("H100", True): ("pallas", "skips what documents do not see, which cuDNN cannot do"),
}


@jax.named_scope(SCOPE)
def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    backend: AttentionBackend = "auto",
) -> jax.Array:
    """softmax(scale q k^T + mask) v (Vaswani et al. 2017, section 3.2.1), softmax in fp32.

    Under `jax.set_mesh` the kernels run on each device's own rows; inside `jax.shard_map` they ask
    for `check_vma=False`.

    Args:
      q_BTNH: queries; query head n reads kv head n // (N / K).
      k_BSKH: keys, S equal to T.
      v_BSKH: values.
      causal: query t sees keys up to t.
      segment_ids: integers of shape (B, T); a token sees its own segment alone.
      scale: factor on the scores, above 0; 1 / sqrt(H) by default.
      backend: `reference` is plain JAX, for every device and memory enough for (B, N, T, T) scores.
        `pallas` and `triton` are FlashAttention on A100, H100 and H200, in bf16 or fp32, for heads
        up to 128 wide; `pallas` is interpreted on a CPU, for tests. `cudnn` is JAX's own, in bf16,
        for an even T, without segment_ids. `auto` takes by `AUTO`, or `reference` where that cannot
        do what is asked, and says so once; on a CPU it is `reference`.

    Returns:
      o_BTNH in the dtype of the queries.

    Raises:
      ValueError: shapes that do not fit together, or what the backend asked for cannot do.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    if k_BSKH.shape != (B, S, K, H) or v_BSKH.shape != k_BSKH.shape or N % K:
        raise ValueError(f"q {q_BTNH.shape}, k {k_BSKH.shape} and v {v_BSKH.shape} do not fit.")
    if T != S:
        raise ValueError(
            f"{T} queries and {S} keys: use cached_attention to decode from a cache of keys."
        )
    if segment_ids is not None and segment_ids.shape != (B, T):
        raise ValueError(f"segment_ids {segment_ids.shape} must have shape {(B, T)}.")
    if segment_ids is not None:
        # As JAX itself would make them; NumPy's wider ones could meet in one segment by wrapping.
        if isinstance(segment_ids, np.ndarray) and segment_ids.size:
            if segment_ids.min() < -(2**31) or segment_ids.max() >= 2**31:
                raise ValueError("segment_ids go beyond 32 bits: number the documents of a row.")
        segment_ids = jnp.asarray(segment_ids, jnp.int32)
    scale = 1 / math.sqrt(H) if scale is None else scale
    if scale <= 0:
        raise ValueError(f"scale is {scale}: it must be above 0.")

    chip = device_chip()
    documents = segment_ids is not None
    if backend == "auto":
        backend, reason = choose_backend(chip, q_BTNH.dtype, H, T, documents)
        if chip != "cpu":  # where there is nothing to choose
            _say_once(f"attention on {chip}: {backend} ({reason})")
    elif complaint := why_not(backend, chip, q_BTNH.dtype, H, T, documents):
        raise ValueError(f"attention backend {backend!r} {complaint}.")

    if backend == "reference":
        return _reference(q_BTNH, k_BSKH, v_BSKH, segment_ids, causal=causal, scale=scale)
    if backend == "cudnn":
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, is_causal=causal, scale=scale, implementation="cudnn"
        )
    run = functools.partial(
        flash_attention,
        causal=causal,
        scale=scale,
        # Imported when asked for: not every machine can load Triton.
        kernels=importlib.import_module(f"tinyllama_jax.model.{backend}_kernels"),
        # The interpreter takes any tiles.
        tiles=TILES[backend, "A100" if chip == "cpu" else chip, str(q_BTNH.dtype), padded_width(H)],
        interpret=chip == "cpu",
        compute_capability=COMPUTE_CAPABILITY.get(chip),
    )
    return _on_own_rows(run)(q_BTNH, k_BSKH, v_BSKH, segment_ids)


def device_chip() -> str:
    """The chip that is compiled for: a value of `CHIPS`, "cpu", or what the device calls itself."""
    mesh = jax.sharding.get_abstract_mesh()
    # A mesh may be of devices that are not here, to compile for them.
    device = jax.devices()[0] if mesh.empty else mesh.abstract_device
    return next(
        (chip for name, chip in CHIPS.items() if name in device.device_kind), device.device_kind
    )


def has_kernels() -> bool:
    """Whether our kernels are made for the chip that is compiled for."""
    return device_chip() in CHIPS.values()


def why_not(
    backend: AttentionBackend, chip: str, dtype, head_width: int, T: int, documents: bool
) -> str | None:
    """What a backend cannot do of what is asked, as the end of a sentence; None if it can all.

    Gradients may be asked of whatever is computed forward, so what cannot be differentiated counts.
    """
    if backend == "cudnn":
        if chip not in CHIPS.values() and "NVIDIA" not in chip:
            return "needs an NVIDIA GPU"
        if documents:
            return "takes no segment_ids: ask for pallas, triton or reference"
        if dtype not in (jnp.bfloat16, jnp.float16):
            return f"computes in bfloat16 or float16, not in {dtype}"
        if head_width % 8 or head_width > 128:
            return f"takes heads of a multiple of 8 up to 128 wide, not {head_width}"
        if T % 2:
            return f"has gradients for rows of an even number of tokens alone, not of {T}"
    if backend in ("pallas", "triton"):
        if chip not in CHIPS.values() and (chip, backend) != ("cpu", "pallas"):
            return f"has no tiles for {chip}: it runs on {', '.join(CHIPS)}"
        if dtype not in (jnp.bfloat16, jnp.float32):
            return f"computes in bfloat16 or float32, not in {dtype}"
        if head_width > HEAD_WIDTHS[-1]:
            return f"takes heads up to {HEAD_WIDTHS[-1]} wide, not {head_width}"
    return None


def choose_backend(
    chip: str, dtype, head_width: int, T: int, documents: bool
) -> tuple[AttentionBackend, str]:
    """What `auto` takes, and why."""
    unknown = ("cudnn", "no kernel of ours is tuned for this chip")
    candidates: list[tuple[AttentionBackend, str]] = [
        ("reference", "plain JAX; the kernels are for GPUs")
        if chip == "cpu"
        else AUTO.get((chip, documents), unknown),
        ("pallas", "the fastest that can do what is asked"),
        ("reference", "no other can do what is asked"),
    ]
    return next(
        candidate
        for candidate in candidates
        if not why_not(candidate[0], chip, dtype, head_width, T, documents)
    )


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def _on_own_rows(run):
    """`run` by every device on its own rows, where a mesh is set that the compiler partitions.

    The compiler cannot cut a kernel in pieces: it would gather all rows on every device. Rows that
    the devices do not divide, such as a single prompt, are computed by all of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    )
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if devices == 1:
        return run

    def run_on_mesh(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        rows = P(axes if q_BTNH.shape[0] % devices == 0 else None)
        specs = (rows, rows, rows, None if segment_ids_BT is None else rows)
        return jax.shard_map(run, in_specs=specs, out_specs=rows, check_vma=False)(
            q_BTNH, k_BTKH, v_BTKH, segment_ids_BT
        )

    return run_on_mesh


def _reference(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, *, causal, scale):
    B, T, N, H = q_BTNH.shape
    visible_BTS = jnp.ones((1, T, T), bool)
    if causal:
        visible_BTS &= jnp.tri(T, dtype=bool)
    if segment_ids_BT is not None:
        visible_BTS &= segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    # Heads before tokens, and the G queries of a kv head as one axis of rows, R = G T: products
    # that sum over one axis, the last or the first, need no transposed copies on CPUs.
    K = k_BSKH.shape[2]
    q_BKGTH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3)
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    scores_BKRS = scale * jnp.einsum(
        "BKRH,BKSH->BKRS", q_BKGTH.reshape(B, K, -1, H), k_BKSH, preferred_element_type=jnp.float32
    )
    scores_BKGTS = jnp.where(
        visible_BTS[:, None, None], scores_BKRS.reshape(B, K, -1, T, T), LOWEST
    )
    # Divided by their sum after the second product: fewer passes over T T numbers, back as forth.
    peaks_BKGT1 = jax.lax.stop_gradient(jnp.max(scores_BKGTS, axis=-1, keepdims=True))
    weights_BKRS = jnp.exp(scores_BKGTS - peaks_BKGT1).reshape(B, K, -1, T)
    sums_BKRH = jnp.einsum(
        "BKRS,BKSH->BKRH",
        weights_BKRS.astype(v_BSKH.dtype),
        v_BKSH,
        preferred_element_type=jnp.float32,
    )
    o_BKRH = sums_BKRH / jnp.sum(weights_BKRS, axis=-1, keepdims=True)
    o_BTKGH = jnp.moveaxis(o_BKRH.reshape(B, K, -1, T, H), 3, 1)
    return o_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)


def cached_attention(
    q_B1NH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    filled_BS: jax.Array,
    *,
    scale: float | None = None,
) -> jax.Array:
    """Attention of the newest token of each row over a cache that holds it, for decoding.

    Args:
      q_B1NH: its queries.
      k_BKSH: cached keys, tokens in any order; head by head, as they are read.
      v_BKSH: cached values.
      filled_BS: bool, which columns of the cache hold a token of the row; no other is looked at.
      scale: factor on the scores; 1 / sqrt(H) by default.

    Returns:
      o_B1NH, equal to the last row of `attention` over the tokens in the cache.
    """
    B, _, N, H = q_B1NH.shape
    K = k_BKSH.shape[1]
    scale = 1 / math.sqrt(H) if scale is None else scale
    q_BKGH = q_B1NH.reshape(B, K, N // K, H)
    scores_BKGS = scale * jnp.einsum(
        "BKGH,BKSH->BKGS", q_BKGH, k_BKSH, preferred_element_type=jnp.float32
    )
    scores_BKGS = jnp.where(filled_BS[:, None, None], scores_BKGS, LOWEST)
    probabilities_BKGS = jax.nn.softmax(scores_BKGS, axis=-1).astype(v_BKSH.dtype)
    o_BKGH = jnp.einsum("BKGS,BKSH->BKGH", probabilities_BKGS, v_BKSH)
    return o_BKGH.reshape(B, 1, N, H).astype(q_B1NH.dtype)
