"""CIFAR-10 on two CPU cores: Ho et al.'s experiment with 1/16 of the width, for 100,000 images.

    python main.py --config=configs/cifar10_small.py --workdir=runs/cifar10_small

Data     official CIFAR-10, or a directory prepared by TFDS: --config.data.data_dir=DIR
Cost     143,267 parameters; 3,125 steps of 32 images; every test image scored by 9 of its 1,000 terms
Expect   4.187 bits/dim (one seed) on pictures recompressed as JPEG; experiments/results/records/ compares
         objectives, with a larger network
Equals   Ho et al. (configs/cifar10.py): schedule, prediction, variance, loss, levels and blocks of the network,
         flips
Differs  1/16 of the width; settings for 800,000 steps are adapted to 3,125: learning rate, warm-up and decay, EMA,
         batch of 32; no dropout
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config() -> ConfigDict:
    """What differs from Ho et al.'s CIFAR-10 experiment."""
    config = cifar10.get_config()
    config.unet.channels = 8
    config.unet.num_groups = 2  # four channels a group, as in the full network
    config.unet.dropout = 0.0
    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 200
    config.optim.decay = "cosine"
    config.ema.decay = 0.995
    config.train.num_steps = 3125
    config.train.batch_size = 32
    config.train.checkpoint_every = 625
    config.train.sample_every = 0
    config.sample.num_images = 64
    config.sample.num_steps = 100
    config.quality.num_images = 500
    return config
