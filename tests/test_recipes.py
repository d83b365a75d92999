"""The configs of the original's runs, held against what it published."""

import pytest

from support.paths import ROOT
from tinyllama_jax.config import LlamaConfig
from tinyllama_jax.config_file import load_config
from tinyllama_jax.data.mixture import make_mixture

CONFIGS = ROOT / "configs"


def load(name):
    return load_config(str(CONFIGS / f"{name}.py"))


def tokens(config):
    return config.rows_after(config.steps) * config.model.context


def test_the_3t_run_is_the_originals():
    config = load("tinyllama_1b")
    assert config.model == LlamaConfig(
        vocab_size=32_000, layers=22, width=2048, query_heads=32, kv_heads=4, head_width=64,
        swiglu_width=5632, context=2048, rope_base=10_000.0, rope_factor=1.0, norm_eps=1e-5,
    )  # fmt: skip
    assert config.model.parameters() == 1_100_048_384
    assert config.batch_rows * config.model.context == 2_097_152
    assert config.batch_rows // config.micro_batches == 16 * 8
    assert config.steps == 1_430_512 and f"{tokens(config):.4e}" == "3.0000e+12"
    assert {source.name: source.weight for source in config.data.sources} == {
        "slimpajama": 0.693584,
        "starcoder": 0.306416,
    }
    optimizer = config.optimizer
    assert (optimizer.peak_lr, optimizer.end_lr, optimizer.warmup_steps) == (4e-4, 4e-5, 2000)
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.1, 1.0)
    assert optimizer.schedule == "cosine" and not optimizer.decay_matrices_only
    assert config.validation.every == config.checkpoint.permanent_every == 5000
    assert config.checkpoint.every == 500
    # The published checkpoints are among those that are never deleted.
    assert all(step % 5000 == 0 for step in (50e3, 240e3, 480e3, 715e3, 955e3, 1195e3))


def test_the_120m_is_the_originals_model_on_a_hundredth_of_the_tokens():
    config = load("tinyllama_120m")
    assert config.model.parameters() == 121_129_728
    model = config.model
    assert (model.layers, model.width, model.swiglu_width) == (12, 768, 2048)
    assert (model.query_heads, model.kv_heads, model.head_width) == (12, 1, 64)
    assert f"{tokens(config):.4e}" == "3.0000e+10"


def test_code_8k_stretches_the_1b_four_times():
    config, base = load("tinyllama_code_8k"), load("tinyllama_1b")
    assert config.model.parameters() == base.model.parameters()
    assert config.model.context == config.model.rope_factor * base.model.context == 8192
    assert config.batch_rows * config.model.context == base.batch_rows * base.model.context
    assert f"{tokens(config):.4e}" == "1.0486e+10"


V1_1 = {
    "get_config": {"slimpajama": 100},
    "math_and_code": {"slimpajama": 75, "starcoder": 15, "proof_pile": 10},
    "chinese": {"slimpajama": 50, "skypile": 50},
}


@pytest.mark.parametrize(("variant", "final"), V1_1.items())
def test_v1_1_follows_its_three_stages(variant, final):
    path = CONFIGS / "tinyllama_v1_1.py"
    config = load_config(f"{path}:{variant}")
    assert config.model.parameters() == 1_100_048_384
    context, cooldown = config.model.context, config.batch_stages[0].after_step
    # By tokens: 1.85e12 and 2e12, each to within a batch.
    assert abs(config.rows_after(cooldown) * context - 1.85e12) < 1.8e6
    assert abs(tokens(config) - 2e12) < 7.2e6
    sizes = [config.rows_after(step + 1) - config.rows_after(step) for step in (0, cooldown)]
    assert [f"{rows * context / 1e6:.1f}" for rows in sizes] == ["1.8", "7.2"]

    names = [source.name for source in config.data.sources]
    assert names == list(final)
    order = make_mixture(config.data, context)
    basic, ramp = 1_500_000_000_000 // context, 6_000_000_000 // context
    assert dict(zip(names, order.counts(basic), strict=True))["slimpajama"] == basic
    half, whole, end = (
        order.counts(basic + rows) for rows in (ramp // 2, ramp, config.rows_after(config.steps))
    )
    for source, name in enumerate(names):
        share = final[name] / 100
        before = basic if name == "slimpajama" else 0
        start = 1.0 if name == "slimpajama" else 0.0
        # The mean share of the ramp's first half lies a quarter of the way, of the whole halfway.
        added = (half[source] - before) / (ramp // 2), (whole[source] - before) / ramp
        assert added == pytest.approx(
            (start + (share - start) / 4, start + (share - start) / 2), abs=1e-5
        )
        last = (end[source] - whole[source]) / (sum(end) - sum(whole))
        assert last == pytest.approx(share, abs=1e-6)
    launched = path.name if variant == "get_config" else f"{path.name}:{variant}"
    assert f"python launch/a100_16.py configs/{launched}\n" in path.read_text()


@pytest.mark.parametrize(
    "name", ["tinyllama_1b", "tinyllama_120m", "tinyllama_code_8k", "tinyllama_v1_1"]
)
def test_a_header_gives_the_steps_and_the_tokens(name):
    config, header = load(name), (CONFIGS / f"{name}.py").read_text().split('"""')[1]
    assert f"{config.steps:,} steps" in header
    if not config.batch_stages:
        assert f"{config.batch_rows * config.model.context:,} tokens" in header
    assert f"{tokens(config):.4e}".replace("+", "") in header
