"""Makes openai.npz: the results of guided-diffusion for two small networks, by PyTorch on a CPU in float32.

    PYTHONPATH=DIRECTORY_OF_GUIDED_DIFFUSION python tests/golden/openai_cases.py

Weights, images and noise come from NumPy's frozen generator, so only the results and the names and shapes of the
tensors are kept. Its "legacy" attention is that of improved-diffusion.
"""

from pathlib import Path

import numpy as np

# Between them every choice of the two programs that changes a layer or a term, and no more layers than that takes.
SMALL = {"package": "guided_diffusion", "image_size": 8, "num_channels": 32, "num_res_blocks": 1}
CASES = {
    "blocks": SMALL
    | {
        "channel_mult": "1,2",
        "attention_resolutions": "4",
        "num_head_channels": 16,
        "resblock_updown": True,
        "use_new_attention_order": True,
        "class_cond": True,
        "learn_sigma": True,
        "noise_schedule": "cosine",
        "diffusion_steps": 7,
        "timestep_respacing": "2,1",
    },
    "convolutions": SMALL
    | {
        "channel_mult": "2,1",
        "attention_resolutions": "8",
        "num_heads": 4,
        "num_heads_upsample": 2,
        "use_scale_shift_norm": False,
        "predict_xstart": True,
        "rescale_timesteps": True,
        "diffusion_steps": 60,
        "timestep_respacing": "ddim3",
    },
}


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Tensors by name, of ordinary size everywhere; norms differ from 1 and 0, too."""
    rng, tensors = np.random.RandomState(0), {}
    for name in sorted(shapes):
        shape = shapes[name]
        size = np.sqrt(3 / np.prod(shape[1:])) if len(shape) > 1 else 0.5
        mean = 1.0 if name.endswith("weight") and len(shape) == 1 else 0.0
        tensors[name] = (mean + size * rng.uniform(-1, 1, shape)).astype(np.float32)
    return tensors


def inputs(num_steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two images in [-1, 1], noise for each t [num_steps, 2, 8, 8, 3], and labels."""
    rng = np.random.RandomState(1)
    x0 = (rng.randint(0, 256, (2, 8, 8, 3)) / 127.5 - 1).astype(np.float32)
    return x0, rng.standard_normal((num_steps, *x0.shape)).astype(np.float32), np.array([3, 998])


def results(flags: dict) -> dict[str, np.ndarray]:
    """Names, shapes, outputs and terms of the original program."""
    import torch
    from guided_diffusion import script_util

    known = script_util.model_and_diffusion_defaults()
    whole = known | {name: value for name, value in flags.items() if name in known}
    network, process = script_util.create_model_and_diffusion(**whole)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    network.load_state_dict({name: torch.tensor(tensor) for name, tensor in weights(shapes).items()})
    x0, eps, labels = inputs(process.num_timesteps)
    x0 = torch.tensor(x0.transpose(0, 3, 1, 2))
    given = {"y": torch.tensor(labels)} if whole["class_cond"] else {}
    outputs, terms = [], []

    def noting(x_t, network_t, **given):
        outputs.append(network.eval()(x_t, network_t, **given))
        return outputs[-1]

    with torch.no_grad():
        for i in range(process.num_timesteps):
            t = torch.full((len(x0),), i)
            x_t = process.q_sample(x0, t, torch.tensor(eps[i].transpose(0, 3, 1, 2)))
            terms.append(process._vb_terms_bpd(noting, x0, x_t, t, model_kwargs=given)["output"])
        prior = process._prior_bpd(x0)
    return {
        "names": np.array(list(shapes)),
        "shapes": np.array([shape + (0,) * (4 - len(shape)) for shape in shapes.values()], np.int16),
        "outputs": np.stack([output.numpy().transpose(0, 2, 3, 1) for output in outputs]),
        "terms_bpd": torch.stack(terms, dim=1).numpy(),
        "prior_bpd": prior.numpy(),
    }


if __name__ == "__main__":
    made = {f"{case}/{name}": array for case, flags in CASES.items() for name, array in results(flags).items()}
    np.savez_compressed(Path(__file__).with_name("openai.npz"), **made)
