"""Tests run on eight CPU devices, with checked shape annotations and no silent broadcasting or promotion."""

import os

# JAX reads the number of devices when it is first imported, so this comes before any other import.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import matplotlib  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

matplotlib.use("Agg")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
install_import_hook("diffusion", "beartype.beartype")
