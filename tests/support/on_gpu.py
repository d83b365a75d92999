"""For tests marked `gpu`, which also run where conftest.py is left out."""

import jax
import pytest


def skip_without_gpu() -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("there is no GPU here")
