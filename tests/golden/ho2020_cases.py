"""Makes ho2020.npz: a TensorFlow checkpoint of Ho et al.'s own network, and that network's outputs.

    PYTHONPATH=DIRECTORY_WITH_ITS_PACKAGE_diffusion_tf python tests/golden/ho2020_cases.py

The original U-Net runs under a current TensorFlow (2.21, float32, a CPU). It uses only the group norm of tf.contrib,
which tf_slim has unchanged. The outputs are those in its `ema_scope`. Weights, images and t come from NumPy's frozen
generator, so only the index, names and shapes are kept beside the outputs; `data` is the file of data.
"""

from pathlib import Path

import numpy as np

# Two levels of 32×32 images, the second one wider and with attention, as at every height of 16 in its networks.
SETTINGS = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (16,), "out_ch": 3}
PREFIX = "model.ckpt-7"


def weights(names: list[str], shapes: list[tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Tensors of every variable by name, of ordinary size everywhere; norms differ from 1 and 0, too."""
    rng, tensors = np.random.RandomState(0), {}
    for name, shape in sorted(zip(names, shapes, strict=True)):
        size = np.sqrt(3 / np.prod(shape[:-1])) if len(shape) > 1 else 0.5
        mean = 1.0 if "gamma" in name else 0.0
        tensors[name] = (mean + size * rng.uniform(-1, 1, shape)).astype(np.float32)
        if name == "global_step":
            tensors[name] = np.array(7)
    return tensors


def data(tensors: dict[str, np.ndarray]) -> bytes:
    """The bytes of model.ckpt-7.data-00000-of-00001: the tensors by name, one behind another."""
    return b"".join(tensors[name].tobytes() for name in sorted(tensors))


def inputs() -> dict[str, np.ndarray]:
    """Two noisy images and their t."""
    x = np.random.RandomState(1).standard_normal((2, 32, 32, 3)).astype(np.float32)
    return {"x": x, "t": np.array([3, 871], np.int32)}


def results(directory: Path) -> dict[str, np.ndarray]:
    """The index of the checkpoint, the names and shapes in it, and the network's outputs by its EMA."""
    import sys
    import types

    import tensorflow
    import tensorflow.compat.v1 as tf
    from tf_slim.layers import normalization

    tensorflow.contrib = types.ModuleType("tensorflow.contrib")
    tensorflow.contrib.layers = normalization
    sys.modules["tensorflow.contrib"] = tensorflow.contrib
    tf.disable_v2_behavior()
    from diffusion_tf import utils
    from diffusion_tf.models import unet

    given = inputs()

    def output():
        return unet.model(
            tf.constant(given["x"]), t=tf.constant(given["t"]), y=None, name="model", num_classes=1, **SETTINGS
        )

    output()
    global_step = tf.train.get_or_create_global_step()
    variables = tf.trainable_variables()
    loss = tf.add_n([tf.reduce_sum(variable) for variable in variables])
    train = tf.train.AdamOptimizer(2e-4).minimize(loss, global_step)
    ema = tf.train.ExponentialMovingAverage(0.9999)
    with tf.control_dependencies([train]):
        ema.apply(variables)
    with utils.ema_scope(ema):
        of_ema = output()
    saved = {variable.op.name: variable for variable in tf.global_variables()}
    shapes = [tuple(variable.shape.as_list()) for variable in saved.values()]
    with tf.Session() as session:
        for name, tensor in weights(list(saved), shapes).items():
            saved[name].load(tensor, session)
        prefix = tf.train.Saver().save(session, str(directory / PREFIX.partition("-")[0]), global_step)
        found = session.run(of_ema)
        others = other_indices(directory, session)
    assert prefix == str(directory / PREFIX)
    assert Path(f"{prefix}.data-00000-of-00001").read_bytes() == data(weights(list(saved), shapes))
    return {
        "index": np.frombuffer(Path(f"{prefix}.index").read_bytes(), np.uint8),
        "names": np.array(list(saved)),
        "shapes": np.array([shape + (0,) * (4 - len(shape)) for shape in shapes], np.int16),
        "output": found,
        **others,
    }


def other_indices(directory: Path, session) -> dict[str, np.ndarray]:
    """Indices of a tensor that is stored in parts, and of two tensors of ones in two shards."""
    import tensorflow.compat.v1 as tf

    def save(name: str, shape_and_slice: str, tensor: tf.Tensor) -> str:
        prefix = str(directory / name)
        slices = {"shape_and_slices": [shape_and_slice], "tensors": [tensor]}
        session.run(tf.raw_ops.SaveV2(prefix=prefix, tensor_names=[name], **slices))
        return prefix

    save("parts", "4 2 0,2:-", tf.ones((2, 2)))
    shards = [save("a", "", tf.ones((2, 3))), save("b", "", tf.ones(5))]
    merged = str(directory / "shards")
    session.run(tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=shards, destination_prefix=merged))
    return {
        f"index_of_{name}": np.frombuffer((directory / f"{name}.index").read_bytes(), np.uint8)
        for name in ("parts", "shards")
    }


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        made = results(Path(scratch))
    np.savez_compressed(Path(__file__).with_name("ho2020.npz"), **made)
