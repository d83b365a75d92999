"""Every option of a run."""

import dataclasses
import json
import math
import re
import runpy

import pytest

from support.paths import ROOT
from tinyllama_jax import config as configs
from tinyllama_jax.config import (
    BatchStageConfig,
    Config,
    DataConfig,
    LlamaConfig,
    OptimizerConfig,
    SourceConfig,
    StageConfig,
    differences,
    to_json,
)
from tinyllama_jax.config_file import installed_configs, load_config, model_of_run, with_defaults
from tinyllama_jax.errors import UserError

CONFIGS = sorted((ROOT / "configs").glob("*.py"))

PRESETS = {
    "TINYLLAMA_1B": 1_100_048_384,
    "TINYLLAMA_CODE_8K": 1_100_048_384,
    "TINYLLAMA_120M": 121_129_728,
}


def staged(*stages):
    return DataConfig((SourceConfig("a", "x", 1.0), SourceConfig("b", "y", 0.0)), stages)


@pytest.mark.parametrize(("name", "count"), PRESETS.items())
def test_presets_have_the_parameters_of_the_original(name, count):
    assert getattr(configs, name).parameters() == count


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"query_heads": 6, "kv_heads": 4}, "kv heads that divide"),
        ({"layers": 0}, "model.layers"),
        ({"head_width": 7}, "even"),
        ({"norm_eps": 0.0}, "model.norm_eps"),
        ({"rope_factor": -1.0}, "rope_factor"),
    ],
)
def test_a_model_that_cannot_be_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        LlamaConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch_rows": 10, "micro_batches": 4}, "not divisible by micro_batches"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2, "optimizer": OptimizerConfig(warmup_steps=2)}, "warm-up"),
        ({"batch_stages": (BatchStageConfig(5, 0),)}, "micro_batches must be above 0"),
        ({"batch_stages": (BatchStageConfig(0, 2),)}, "they must rise, from 1 on"),
        ({"batch_stages": (BatchStageConfig(5, 2), BatchStageConfig(5, 4))}, "they must rise"),
        ({"optimizer": OptimizerConfig("wsd", decay_steps=7001)}, "shorten the decay"),
    ],
)
def test_a_run_that_cannot_be_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        Config(**{"run_folder": "r", "model": LlamaConfig(), "data": DataConfig(), "steps": 9000,
                  "batch_rows": 8} | fields)  # fmt: skip


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OptimizerConfig(peak_lr=1e-4, end_lr=1e-3), "end_lr"),
        (lambda: OptimizerConfig(beta2=1.0), "beta2"),
        (lambda: OptimizerConfig("wsd"), "wsd needs a number above 0"),
        (lambda: OptimizerConfig("wsd", decay_steps=-1), "wsd needs a number above 0"),
        (lambda: OptimizerConfig("linear", decay_steps=5), "other schedules take none"),
        (lambda: DataConfig((configs.SourceConfig("a", "b", math.nan),)), "weights"),
        (lambda: DataConfig((configs.SourceConfig("a", "b", -1.0),)), "weights"),
        (lambda: DataConfig((configs.SourceConfig("a", "b", 0.0),)), "weights"),
        (lambda: staged(), "'b' has weight 0 throughout"),
        (lambda: staged(StageConfig(8, (1.0, 0.0))), "'b' has weight 0 throughout"),
        (lambda: staged(StageConfig(8, (1.0,))), "1 weights for 2 sources"),
        (lambda: staged(StageConfig(8, (0.0, 0.0))), "one of them above 0"),
        (lambda: staged(StageConfig(8, (1.0, math.inf))), "one of them above 0"),
        (lambda: staged(StageConfig(0, (0.0, 1.0))), "must start after token 0"),
        (lambda: staged(StageConfig(8, (0.0, 1.0), ramp_tokens=-1)), "with a ramp of -1"),
        (
            lambda: staged(StageConfig(8, (0.0, 1.0), 4), StageConfig(11, (1.0, 1.0))),
            "stages.1 starts at 11 .*end at 12",
        ),
        (lambda: DataConfig((configs.SourceConfig("a", "b"),) * 2), "share a name"),
        (lambda: configs.CheckpointConfig(every=4, permanent_every=6), "multiple"),
        (lambda: configs.SampleConfig(temperature=-1.0), "temperature"),
        (lambda: load_config("nowhere.py"), "no config file"),
    ],
)
def test_other_mistakes_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_differences_name_what_decides_the_numbers_and_nothing_else(config):
    changed = dataclasses.replace(
        config,
        log_every=5,
        run_folder="elsewhere",
        steps=13,
        seed=1,
        model=dataclasses.replace(config.model, layers=3),
    )
    assert differences(to_json(config), to_json(changed)) == [
        "model.layers: 2 -> 3",
        "seed: 0 -> 1",
    ]


def test_options_that_came_after_a_run_stand_at_their_defaults_in_it(config):
    saved = to_json(config)
    del saved["data"]["mask_documents"], saved["data"]["sources"][0]["max_epochs"]
    del saved["execution"]
    assert with_defaults(saved, config) == to_json(config)
    data = dataclasses.replace(config.data, mask_documents=True, sources=config.data.sources[:1])
    fewer = dataclasses.replace(config, data=data, seed=3)
    changed = differences(with_defaults(saved, fewer), to_json(fewer))
    assert [line.split(":")[0] for line in changed] == [
        "data.mask_documents",
        "data.sources",
        "seed",
    ]
    assert changed[0] == "data.mask_documents: False -> True"


def test_the_model_of_a_run_survives_json(config, tmp_path):
    with pytest.raises(UserError, match="no run"):
        model_of_run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    assert model_of_run(tmp_path) == config.model
    for damaged in ("{", "{}", '{"model": {"depth": 3}}'):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(UserError, match="damaged"):
            model_of_run(tmp_path)


def test_rows_read_are_the_sum_over_the_steps(config):
    stages = (BatchStageConfig(5, 6), BatchStageConfig(9, 1), BatchStageConfig(11, 4))
    config = dataclasses.replace(config, batch_stages=stages)
    sizes = [2] * 5 + [6] * 4 + [1] * 2 + [4] * 9
    assert [config.rows_after(step) for step in range(21)] == [
        8 * sum(sizes[:step]) for step in range(21)
    ]


def test_a_variant_is_a_function_of_its_config_file(config, tmp_path):
    file = tmp_path / "c.py"
    file.write_text(
        f"from tinyllama_jax.config import *\n\ndef get_config():\n    return {config!r}\n"
        "\ndef longer():\n    return dataclasses.replace(get_config(), steps=99)\n"
    )
    assert load_config(str(file)) == config
    assert load_config(f"{file}:longer") == dataclasses.replace(config, steps=99)
    with pytest.raises(UserError, match=r"c.py defines no shorter\(\)"):
        load_config(f"{file}:shorter")
    with pytest.raises(UserError, match="no config file 'nowhere.py'"):
        load_config("nowhere.py:longer")


def test_a_config_that_comes_with_the_package_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert installed_configs() == [path.stem for path in CONFIGS]
    assert load_config("demo") == load_config(str(ROOT / "configs" / "demo.py"))
    variant = load_config("tinyllama_v1_1:chinese")
    assert variant == load_config(f"{ROOT / 'configs' / 'tinyllama_v1_1.py'}:chinese")
    assert variant != load_config("tinyllama_v1_1")
    (tmp_path / "demo").write_text("def get_config():\n    return 3")  # a file comes first
    with pytest.raises(UserError, match="gives no Config"):
        load_config("demo")


@pytest.mark.parametrize("text", ["x = 1", "def get_config():\n    return 3"])
def test_a_config_file_that_gives_no_config_is_refused(text, tmp_path):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(UserError, match="get_config"):
        load_config(str(tmp_path / "c.py"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\ny = (", "line 2 .*SyntaxError"),
        ("import nosuchmodule", "line 1 .*nosuchmodule"),
        ("\n\ndef get_config():\n    return Config()", "line 4 .*NameError"),
        ("def get_config(steps): ...", "steps"),
        ("get_config = 3", "get_config"),
        ("\0", "null bytes"),
    ],
)
def test_a_config_file_with_a_mistake_costs_one_sentence(text, words, tmp_path):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(UserError, match=words):
        load_config(str(tmp_path / "c.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_loads_and_says_how_to_run_it(path):
    assert isinstance(load_config(str(path)), Config)
    header = runpy.run_path(str(path))["__doc__"]
    assert re.search(rf"(tinyllama train|python launch/\w+\.py) configs/{path.name}", header)
