"""Eight fake devices, and a run small enough to be stopped, killed and compared bit by bit."""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

# Unoptimised programs: they compile four times as fast, and the suite compiles more than it runs.
# In the environment, so that the processes which tests start compile the same programs.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # a test's own process may want others
# Tests marked `gpu` run where it says otherwise: JAX_PLATFORMS=cuda pytest -m gpu
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One program is compiled once a session, however many workers, runs and processes ask for it: the
# process that started a worker has made the folder, and removes it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="tinyllama-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# lm-eval's libraries: nothing is asked of a network, and nothing stays in the user's caches.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = os.environ["JAX_COMPILATION_CACHE_DIR"] + "/huggingface"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.corpora import (
    CASES,
    GROUP_BYTES,
    golden_documents,
    write_slimpajama,
    write_starcoder,
    write_token_files,
)
from support.models import ODD, SMALL, VOCAB
from support.paths import GOLDEN
from tinyllama_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    SampleConfig,
    SourceConfig,
    ValidationConfig,
    to_json,
)
from tinyllama_jax.conversion import huggingface
from tinyllama_jax.data.tokenizer import train_tokenizer
from tinyllama_jax.model import llama
from tinyllama_jax.preparation.corpus import prepare_corpus
from tinyllama_jax.preparation.documents import prepare_documents
from tinyllama_jax.runtime.checkpoint import Checkpoints
from tinyllama_jax.runtime.mesh import make_mesh
from tinyllama_jax.training.step import init_state


def pytest_collection_modifyitems(items):
    """Files marked `long` come first: each is taken by one worker, which would still be at it when
    the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> DataConfig:
    """Two datasets and a tokenizer, made from the text committed beside this file."""
    folder = tmp_path_factory.mktemp("data")
    train_tokenizer([(GOLDEN / "text.txt").read_text()], VOCAB, folder / "tokenizer.model")
    for source in ("prose", "code"):
        splits = {split: golden_documents(source, split) for split in ("train", "validation")}
        prepare_documents(source, splits, folder / "tokenizer.model", folder / source)
    return DataConfig(
        sources=(
            SourceConfig("prose", str(folder / "prose"), 0.7),
            SourceConfig("code", str(folder / "code"), 0.3),
        ),
        tokenizer=str(folder / "tokenizer.model"),
    )


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    write_slimpajama(folder / "slimpajama")
    write_starcoder(folder / "starcoder")
    write_token_files(folder / "tokens")
    return folder


@pytest.fixture
def prepared(sources, data, tmp_path):
    """Prepares a corpus in another way each time it is called, into a folder of the test."""

    def prepare(name, out="d", source=None, **options):
        options = {"processes": 1, "group_bytes": GROUP_BYTES} | options
        source = source or sources / name
        return prepare_corpus(
            name, CASES[name], source, Path(data.tokenizer), tmp_path / out, **options
        )

    return prepare


@pytest.fixture(scope="session")
def llama2() -> Path:
    """Llama 2's tokenizer, which is not ours to ship."""
    if "TINYLLAMA_TOKENIZER" not in os.environ:
        pytest.skip("TINYLLAMA_TOKENIZER is not set")
    return Path(os.environ["TINYLLAMA_TOKENIZER"])


@pytest.fixture
def config(data, tmp_path) -> Config:
    """A run of 12 steps that saves, validates and samples on the way."""
    return Config(
        run_folder=str(tmp_path / "run"),
        model=SMALL,
        data=data,
        steps=12,
        batch_rows=16,
        micro_batches=2,
        log_every=1,
        optimizer=OptimizerConfig(peak_lr=1e-2, end_lr=1e-3, warmup_steps=3),
        checkpoint=CheckpointConfig(every=3, keep=2),
        validation=ValidationConfig(every=6, rows=8),
        sample=SampleConfig(every=12, prompts=("The",), max_tokens=4),
    )


@pytest.fixture
def mesh():
    """One device."""
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory):
    from support.tokenizers import train

    return train(tmp_path_factory.mktemp("tokenizer") / "small.model")


@pytest.fixture(scope="session")
def weights():
    """Random everywhere, gains included, so that no two tensors can be taken for each other."""
    generator = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(0.3 * generator.standard_normal(leaf.shape, np.float32))

    return jax.tree.map(draw, llama.abstract_weights(ODD))


@pytest.fixture(scope="session")
def exported(weights, small_tokenizer, tmp_path_factory):
    """One export for all tests that only read it."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    huggingface.export(weights, ODD, small_tokenizer, folder)
    return folder


@pytest.fixture
def source(config, mesh):
    """A run of two checkpoints, of random states, as it lies on disk."""
    folder = Path(config.run_folder).with_name("source")
    source = dataclasses.replace(config, run_folder=str(folder))
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(folder, CheckpointConfig(every=1))
        for step in (9, 10):
            state = init_state(dataclasses.replace(config, seed=step), mesh)
            state |= {"step": state["step"] + step, "skipped": state["skipped"] + 1}
            checkpoints.save(state, {"rows": step, "fingerprint": {}, "config": {}})
        checkpoints.close()
    (folder / "config.json").write_text(json.dumps(to_json(source)))
    shutil.copyfile(config.data.tokenizer, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def optimised_instructions():
    """`(opcode, shape)` of what XLA makes of a function, with the optimisation that runs have."""

    def instructions(function, *args) -> list[tuple[str, tuple[int, ...]]]:
        options = {"xla_backend_optimization_level": 3}
        program = jax.jit(function).lower(*args).compile(compiler_options=options).as_text()
        found = re.findall(r" = \w+\[([\d,]*)\]\S* ([\w-]+)\(", program)
        return [
            (opcode, tuple(map(int, dims.split(",") if dims else ()))) for dims, opcode in found
        ]

    return instructions
