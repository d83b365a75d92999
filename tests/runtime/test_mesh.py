"""Leaves by name."""

import jax.numpy as jnp
import pytest

from tinyllama_jax.runtime.mesh import WEIGHT_AXES, named_leaves, weight_name


def test_leaves_are_named_by_their_path():
    tree = {"b": {"c": jnp.ones(1)}, "a": (jnp.ones(2), [jnp.ones(3)])}
    assert {name: leaf.size for name, leaf in named_leaves(tree).items()} == {
        "a.0": 2,
        "a.1.0": 3,
        "b.c": 1,
    }


@pytest.mark.parametrize("name", WEIGHT_AXES)
def test_a_moment_belongs_to_its_weight(name):
    assert weight_name(f"optimizer.1.0.mu.{name}") == name == weight_name(name)


def test_a_name_that_only_ends_alike_is_refused():
    with pytest.raises(KeyError):
        weight_name("weights.blocks.other_norm_D")
