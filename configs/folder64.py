"""A start for your own pictures at 64×64, for one GPU: docs/own_data.md.

    python -m diffusion.data.folder ~/photos --name=photos --size=64
    python main.py --config=configs/folder64.py --config.data.name=photos --workdir=runs/photos

Data     what diffusion.data.folder prepared under data.name
Cost     39,629,062 parameters; 200,000 steps of 64 images, 46 GFLOP per image and forward pass
Memory   5.6 GiB compiled for one H100 (benchmarks.compiled, 2026-11-27); at most 21 GiB by --mode=describe. For less,
         train.grad_accum=2 or 4
Expect   it depends on the pictures; nothing is measured yet
Paper    none: a recipe of this project, from Nichol & Dhariwal's network and L_hybrid, v-prediction and
         low-discrepancy t; it was not compared with any published one

DPM-Solver++ draws samples in 50 steps instead of 1,000. Turn mirroring off (data.flip) if left and right matter, as in
pictures of text.
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config() -> ConfigDict:
    """What differs from Ho et al.'s CIFAR-10 experiment."""
    config = cifar10.get_config()
    config.data.name = "photos"
    config.data.validation = -1  # a tenth
    config.schedule.name = "cosine"
    config.model.prediction = "v"
    config.model.variance = "learned_range"
    config.objective.name = "hybrid"
    config.objective.timesteps = "low_discrepancy"
    config.unet.attention_resolutions = (16, 8)
    config.unet.num_heads = 4
    config.unet.scale_shift_norm = True
    config.unet.dtype = "bfloat16"
    config.optim.learning_rate = 1e-4
    config.optim.warmup_steps = 1000
    config.train.num_steps = 200_000
    config.train.batch_size = 64
    config.train.sample_every = 5000
    config.sample.method = "dpm_solver_pp"
    config.sample.num_steps = 50
    return config
