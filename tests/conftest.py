"""Tests run on eight CPU devices, with checked shape annotations and no silent broadcasting or promotion."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"  # also where an accelerator is present: eight devices are assumed below
# JAX reads the number of devices when it is first imported, so this comes before any other import.
# Tests compile far more than they compute, so they compile without optimization: half the time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax  # noqa: E402
import matplotlib  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

matplotlib.use("Agg")
# Equal programs compile once a session; the folder goes when the session ends.
COMPILED = tempfile.TemporaryDirectory(prefix="diffusion-tests-")
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
install_import_hook("diffusion", "beartype.beartype")
