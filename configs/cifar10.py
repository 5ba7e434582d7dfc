"""Ho, Jain & Abbeel (2020) on CIFAR-10: L_simple, ε-prediction, fixed variance.

    python main.py --config=configs/cifar10.py --workdir=runs/cifar10

Data     official CIFAR-10 (163 MB, downloaded once), or a directory prepared by TFDS: --config.data.data_dir=DIR
Cost     35,746,307 parameters; 800,000 steps of 128 images; about 35 GFLOP per image and step. The end scores all test
         images, and as many training images, by 9 of their 1,000 terms: an estimate with its standard error.
         --config.eval.terms_per_image=0 computes every term, which takes 102 times as many passes
Expect   the paper: at most 3.75 bits/dim on test (3.72 on train), FID 3.17; not yet reproduced here
Equals   the paper and its code (hojonathanho/diffusion): network and initialization, schedule, loss, Adam,
         warm-up, EMA, batch, flips; x̂_0 is clipped where samples are drawn and scored
Differs  the code clips the gradient of each replica, before the sum over replicas, and TensorFlow's Adam adds
         its ε elsewhere. It scores 9,984 test images, with an approximate CDF in the decoder (eval.protocol=ho2020
         does so, too), and computes FID from samples that are not rounded to pixel values

This file sets the keys that define the experiment. All other keys are at their defaults: --mode=describe and
docs/config_keys.md list every key with its help. Other configs start from this one and change some keys. A name may
carry arguments of its function, as in "linear(beta_end=0.03)".
"""

from ml_collections import ConfigDict

from diffusion.experiment import schema


def get_config() -> ConfigDict:
    """The config; the numbers are the paper's."""
    config = schema.default_config()
    config.data.name = "cifar10"
    config.data.flip = True

    config.schedule.name = "linear"
    config.schedule.num_steps = 1000
    config.model.prediction = "eps"
    config.model.variance = "fixed_large"
    config.objective.name = "simple"
    config.objective.timesteps = "uniform"

    config.unet.channels = 128
    config.unet.channel_mult = (1, 2, 2, 2)
    config.unet.num_res_blocks = 2
    config.unet.attention_resolutions = (16,)
    config.unet.num_groups = 32
    config.unet.num_heads = 1
    config.unet.dropout = 0.1

    config.optim.name = "adam"
    config.optim.learning_rate = 2e-4
    config.optim.warmup_steps = 5000
    config.optim.decay = "constant"
    config.optim.grad_clip = 1.0
    config.ema.decay = 0.9999
    config.train.num_steps = 800_000
    config.train.batch_size = 128

    config.eval.terms_per_image = 9  # all 1,000 terms of both splits would be 2e7 passes through the network
    config.sample.method = "ancestral"
    return config
