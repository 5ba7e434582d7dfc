"""Traces each network of these tests once."""

import functools

import pytest

from diffusion.interop import diffusers


@pytest.fixture(scope="session", autouse=True)
def shapes_are_traced_once():
    """The shapes of a network's parameters take half a second, and most tests here read the same network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers, "_param_shapes", functools.cache(diffusers._param_shapes))
        yield
