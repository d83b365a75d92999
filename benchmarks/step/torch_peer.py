"""The training step of our models in PyTorch, by its fastest means, to compare ours with.

The decoder, batch and update are ours: fp32 weights, products in `precision` by autocast, attention
by `scaled_dot_product_attention` on grouped heads, cross-entropy on a chunk of tokens at a time,
gradient clipping, and fused AdamW that decays every weight. training.py in this folder runs it.

Shapes: B rows, T tokens, D width, N query and K kv heads, H head width, F SwiGLU width, V pieces.
"""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from tinyllama_jax.config import LlamaConfig, OptimizerConfig

BACKENDS = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "auto": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
}
HEAD_CHUNKS = 8  # parts of a micro-batch, of which only one has its logits in memory at a time


class Block(nn.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x)); q|k|v and gate|up are one product each."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, H, N, K = config.width, config.head_width, config.query_heads, config.kv_heads
        self.config = config
        self.attention_norm = nn.RMSNorm(D, config.norm_eps)
        self.qkv = nn.Linear(D, (N + 2 * K) * H, bias=False)
        self.output = nn.Linear(N * H, D, bias=False)
        self.swiglu_norm = nn.RMSNorm(D, config.norm_eps)
        self.gate_up = nn.Linear(D, 2 * config.swiglu_width, bias=False)
        self.down = nn.Linear(config.swiglu_width, D, bias=False)

    def forward(self, x_BTD, cos_Th, sin_Th):
        B, T, _ = x_BTD.shape
        N, K, H = self.config.query_heads, self.config.kv_heads, self.config.head_width
        heads_BTMH = self.qkv(_norm(self.attention_norm, x_BTD)).view(B, T, N + 2 * K, H)
        q_BNTH, k_BKTH, v_BKTH = heads_BTMH.transpose(1, 2).split([N, K, K], dim=1)
        o_BNTH = F.scaled_dot_product_attention(
            _rotate(q_BNTH, cos_Th, sin_Th),
            _rotate(k_BKTH, cos_Th, sin_Th),
            v_BKTH,
            is_causal=True,
            enable_gqa=N != K,
        )
        x_BTD = x_BTD + self.output(o_BNTH.transpose(1, 2).reshape(B, T, N * H))
        gate_BTF, up_BTF = self.gate_up(_norm(self.swiglu_norm, x_BTD)).chunk(2, dim=-1)
        return x_BTD + self.down(F.silu(gate_BTF) * up_BTF)


def _norm(norm: nn.RMSNorm, x_BTD):
    """RMSNorm in the dtype of `x_BTD`, which autocast's fp32 gain would widen to fp32."""
    return F.rms_norm(x_BTD, norm.normalized_shape, norm.weight.to(x_BTD.dtype), norm.eps)


def _rotate(x_BNTH, cos_Th, sin_Th):
    """Rotary position embedding, computed in fp32."""
    a, b = x_BNTH.float().chunk(2, dim=-1)
    return torch.cat([a * cos_Th - b * sin_Th, b * cos_Th + a * sin_Th], -1).to(x_BNTH.dtype)


class Llama(nn.Module):
    """The decoder without its head: returns the residual stream after the last norm."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        half = config.head_width // 2
        frequencies_h = config.rope_base ** (-torch.arange(half) / half)
        positions_T1 = torch.arange(config.context)[:, None] / config.rope_factor
        self.register_buffer("cos_Th", (positions_T1 * frequencies_h).cos(), persistent=False)
        self.register_buffer("sin_Th", (positions_T1 * frequencies_h).sin(), persistent=False)

    def forward(self, tokens_BT, dtype):
        x_BTD = self.embedding(tokens_BT).to(dtype)
        for block in self.blocks:
            x_BTD = block(x_BTD, self.cos_Th, self.sin_Th)
        return _norm(self.norm, x_BTD)


def init_weights(model: nn.Module) -> None:
    """Draws all matrices at the scale of initial weights, so that no number is out of range."""
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.02)


def load_hf_tensors(model: Llama, tensors: dict[str, torch.Tensor]) -> None:
    """Fills the model with the tensors of a Hugging Face Llama, by name."""

    def layer(index: int) -> dict[str, torch.Tensor]:
        prefix = f"model.layers.{index}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        heads = [own[f"self_attn.{name}_proj.weight"] for name in "qkv"]
        return {
            "attention_norm.weight": own["input_layernorm.weight"],
            "qkv.weight": torch.cat(heads),
            "output.weight": own["self_attn.o_proj.weight"],
            "swiglu_norm.weight": own["post_attention_layernorm.weight"],
            "gate_up.weight": torch.cat(
                [own[f"mlp.{name}_proj.weight"] for name in ("gate", "up")]
            ),
            "down.weight": own["mlp.down_proj.weight"],
        }

    state = {
        "embedding.weight": tensors["model.embed_tokens.weight"],
        "norm.weight": tensors["model.norm.weight"],
        "head.weight": tensors["lm_head.weight"],
    }
    for index in range(len(model.blocks)):
        state |= {f"blocks.{index}.{name}": tensor for name, tensor in layer(index).items()}
    model.load_state_dict(state)


def chunked_loss(head_loss, h_BTD, head_VD, targets_BT):
    """Sum of the cross-entropies; logits of a chunk are computed again in the backward pass."""
    pieces = zip(
        h_BTD.flatten(0, 1).chunk(HEAD_CHUNKS), targets_BT.flatten().chunk(HEAD_CHUNKS), strict=True
    )
    return sum(checkpoint(head_loss, h, head_VD, y, use_reentrant=False) for h, y in pieces)


def head_loss(h_RD, head_VD, targets_R):
    """Sum of the cross-entropies of R tokens, from fp32 logits."""
    logits_RV = F.linear(h_RD, head_VD.to(h_RD.dtype)).float()
    return F.cross_entropy(logits_RV, targets_R, reduction="sum")


def transformers_model(config: LlamaConfig, **options):
    """LlamaForCausalLM of transformers in this shape, with its own random weights."""
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.swiglu_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.query_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_width,
            max_position_embeddings=config.context,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=False,
            **options,
        )
    )


class Trainer:
    """A model and its optimizer; `step` is one optimizer update.

    Args:
      config: the model.
      device: `cuda` or `cpu`.
      precision: dtype of matrix products, `bfloat16` or `float32`.
      optimizer: AdamW's settings; the learning rate rises from 0 and falls by a cosine.
      steps: number of steps after which the learning rate is `end_lr`.
      attention: a row of `BACKENDS`; a CPU has only one backend, whatever is given.
      whose: `ours` for the modules above, or `transformers`.
      compiled: whether torch.compile compiles the step, which is eager otherwise.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        device: str,
        precision: str,
        optimizer: OptimizerConfig,
        steps: int,
        attention: str = "auto",
        whose: str = "ours",
        compiled: bool = True,
    ):
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        self.device, self.dtype = device, getattr(torch, precision)
        self.config, self.steps, self.steps_made = optimizer, steps, 0
        self.backends = BACKENDS[attention]
        # Made on its device: a CPU takes a quarter of a minute to draw 1.1B numbers.
        with torch.device(device):
            if whose == "transformers":
                self.model = transformers_model(config, attn_implementation="sdpa", use_cache=False)
            else:
                self.model = Llama(config)
        if whose == "transformers":
            self.head = self.model.lm_head
            hidden = torch.compile(self.model.model) if compiled else self.model.model
            self.hidden = lambda tokens_BT: hidden(input_ids=tokens_BT).last_hidden_state
        else:
            self.head = self.model.head
            hidden = torch.compile(self.model) if compiled else self.model
            self.hidden = lambda tokens_BT: hidden(tokens_BT, self.dtype)
        init_weights(self.model)
        self.model.to(device)
        self.head_loss = torch.compile(head_loss) if compiled else head_loss
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimizer.peak_lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=device == "cuda",
        )

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.dtype != torch.float32:
                stack.enter_context(torch.autocast(self.device, dtype=self.dtype))
            if self.device == "cuda":
                stack.enter_context(sdpa_kernel(self.backends))
            yield

    def step(self, tokens_ABS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes one update; returns (mean loss in nats a token, gradient norm before clipping)."""
        targets = tokens_ABS[..., 1:].numel()
        total = torch.zeros((), device=self.device)
        for tokens_BS in tokens_ABS:
            with self._context():
                h_BTD = self.hidden(tokens_BS[:, :-1])
                losses = chunked_loss(self.head_loss, h_BTD, self.head.weight, tokens_BS[:, 1:])
                loss = losses / targets
            loss.backward()
            total += loss.detach()
        clip_norm = self.config.clip_norm
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_made += 1
        return total, norm

    def _rate(self) -> float:
        peak, end, warmup = self.config.peak_lr, self.config.end_lr, self.config.warmup_steps
        if self.steps_made < warmup:
            return peak * self.steps_made / warmup
        done = min((self.steps_made - warmup) / (self.steps - warmup), 1.0)
        return end + (peak - end) * (1 + math.cos(math.pi * done)) / 2

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None


def timed_steps(trainer: Trainer, batches: Iterable, begun: float) -> dict:
    """Makes a step for each batch of tokens (A, B, S).

    Returns:
      `seconds` and `losses` of all steps, `first_step_seconds` from `begun` (by time.time()) to the
      end of the first, and `peak_bytes`, None on a CPU.
    """
    seconds, losses, first = [], [], 0.0
    for tokens_ABS in batches:
        tokens_ABS = torch.as_tensor(tokens_ABS, dtype=torch.int64, device=trainer.device)
        trainer.wait()
        before = time.perf_counter()
        loss, _ = trainer.step(tokens_ABS)
        trainer.wait()
        seconds.append(time.perf_counter() - before)
        losses.append(float(loss))
        first = first or time.time() - begun
    return {
        "seconds": seconds,
        "losses": losses,
        "first_step_seconds": first,
        "peak_bytes": trainer.peak_bytes(),
    }
