"""Where training starts if not at random weights: a directory of published ones, `init_from`."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jaxtyping import PyTree

from diffusion import interop


def params(directory: str, network: nn.Module, image_shape: tuple[int, int, int]) -> PyTree:
    """The parameters in `directory`, on the host.

    Raises:
        FileNotFoundError, ValueError: see `interop.load_diffusers`.
        ValueError: they are those of another network.
    """
    theirs, published = interop.load_diffusers(directory)
    prefix = f"init_from={directory!r} holds another network than the config's"
    weightless = {"dropout", "convolution", "dtype", "remat", "parent", "name"}
    fields = [field.name for field in dataclasses.fields(theirs) if field.name not in weightless]
    differing = [
        f"unet.{field}: {getattr(theirs, field)!r} there, {getattr(network, field, None)!r} here"
        for field in fields
        if getattr(theirs, field) != getattr(network, field, None)
    ]
    if differing:
        raise ValueError(f"{prefix}: {'; '.join(differing)}")
    # Equal fields still mean another network where the images have another size or other channels.
    like = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *image_shape)), jnp.zeros(1))["params"]
    found, wanted = (
        {"/".join(path): leaf.shape for path, leaf in flatten_dict(tree).items()} for tree in (published, like)
    )
    if differ := sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)):
        raise ValueError(f"{prefix}, whose images are {image_shape}: {', '.join(differ)} differ")
    return jax.device_get(published)  # on a device they would stay beside the state that is trained
