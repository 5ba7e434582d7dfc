"""Makes vdm.npz: the results of google-research/vdm for two small networks, in float32 on a CPU.

    JAX_PLATFORMS=cpu PYTHONPATH=DIRECTORY_WITH_ITS_PACKAGE_vdm python tests/golden/vdm_cases.py

The original code runs under a current Flax. It imports chex only for the name of a type, so a stub is enough. Weights,
images, instants and noise come from NumPy's frozen generator, so only the results and the names and shapes of the
tensors are kept. The terms are the three losses of that code, in nats per image.
"""

from pathlib import Path

import numpy as np

# Between them every part that the public configs choose, and the number of KL terms; ends of γ that differ from those
# that the network's input is scaled by, as a learned γ has them.
SMALL = {"vocab_size": 256, "sample_softmax": False, "antithetic_time_sampling": False, "sm_n_embd": 32}
SMALL |= {"sm_pdrop": 0.1, "gamma_min": -13.3, "gamma_max": 5.0}
CASES = {
    "scalar": SMALL
    | {"gamma_type": "learnable_scalar", "with_fourier_features": True, "with_attention": False, "sm_n_layer": 2},
    "nnet": SMALL
    | {"gamma_type": "learnable_nnet", "with_fourier_features": False, "with_attention": True, "sm_n_layer": 1},
}
STEPS = {"10": 10, "1000": 1000, "inf": 0}  # sm_n_timesteps
GAMMA = {"w": 17.9, "b": -12.9, "l1/kernel": 14.0, "l1/bias": -11.0}  # of ordinary size they would be no γ
BEND = 200  # as much larger is the part of the nnet's γ that is no straight line


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Tensors by path, of ordinary size everywhere; norms differ from 1 and 0, too."""
    rng, tensors = np.random.RandomState(0), {}
    for path in sorted(shapes):
        shape = shapes[path]
        size = np.sqrt(3 / np.prod(shape[:-1])) if len(shape) > 1 else 0.5
        mean = 1.0 if path.endswith("scale") else 0.0
        tensors[path] = (mean + size * rng.uniform(-1, 1, shape)).astype(np.float32)
        if path.startswith("gamma/") and (own := GAMMA.get(path.removeprefix("gamma/"))):
            tensors[path] = np.full(shape, own, np.float32)
        if path == "gamma/l3/kernel":
            tensors[path] *= BEND
    return tensors


def inputs() -> dict[str, np.ndarray]:
    """Two images of pixel values, an instant for each, and the noise of z_0 and of z_t."""
    rng = np.random.RandomState(1)
    shape = (2, 8, 8, 3)
    return {
        "images": rng.randint(0, 256, shape).astype(np.uint8),
        "t": np.array([0.2345, 0.7531], np.float32),
        "eps_0": rng.standard_normal(shape).astype(np.float32),
        "eps": rng.standard_normal(shape).astype(np.float32),
    }


def results(settings: dict) -> dict[str, np.ndarray]:
    """Names, shapes, and for each number of steps the three losses and the network's ε̂ of the original program."""
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import flatten_dict, unflatten_dict
    from vdm.model_vdm import VDM, VDMConfig

    given, found = inputs(), {}
    images, conditioning = jnp.asarray(given["images"], jnp.float32), jnp.zeros(2)
    rngs = {"params": jax.random.key(0), "sample": jax.random.key(1)}
    for name, num_steps in STEPS.items():
        model = VDM(VDMConfig(**settings, sm_n_timesteps=num_steps))
        tree = flatten_dict(jax.eval_shape(model.init, rngs, images, conditioning)["params"], sep="/")
        shapes = {path: leaf.shape for path, leaf in tree.items()}
        params = {"params": unflatten_dict(weights(shapes), sep="/")}
        normal, uniform, noise = jax.random.normal, jax.random.uniform, [given["eps"], given["eps_0"]]
        jax.random.normal = lambda *_, **__: jnp.asarray(noise.pop())  # noqa: B023
        jax.random.uniform = lambda *_, **__: jnp.asarray(given["t"])
        try:
            losses = model.apply(params, images, conditioning, rngs={"sample": rngs["sample"]})
        finally:
            jax.random.normal, jax.random.uniform = normal, uniform
        found |= {"recon": losses.loss_recon, "klz": losses.loss_klz, f"diff_{name}": losses.loss_diff}

    def eps_hat(model):
        f, g = model.encdec.encode(images), model.gamma(jnp.asarray(given["t"]))
        var = jax.nn.sigmoid(g)[:, None, None, None]
        z = jnp.sqrt(1 - var) * f + jnp.sqrt(var) * given["eps"]
        return z, model.gamma(jnp.linspace(0.0, 1.0, 11)), model.score_model(z, g, conditioning)

    found |= dict(zip(("z", "gamma_of_tenths", "eps_hat"), model.apply(params, method=eps_hat), strict=True))
    found["names"] = np.array(list(shapes))
    found["shapes"] = np.array([shape + (0,) * (4 - len(shape)) for shape in shapes.values()], np.int16)
    return {name: np.asarray(array) for name, array in found.items()}


if __name__ == "__main__":
    made = {f"{case}/{name}": array for case, settings in CASES.items() for name, array in results(settings).items()}
    np.savez_compressed(Path(__file__).with_name("vdm.npz"), **made)
