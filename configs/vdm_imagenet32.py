"""Kingma et al. (2021, VDM) on ImageNet 32×32.

    python main.py --config=configs/vdm_imagenet32.py --workdir=runs/vdm_imagenet32

Data     downsampled_imagenet/32x32 as TFDS prepared it: the old set (van den Oord et al. 2016). The new set, made by
         ImageNet's site in 2021 with anti-aliasing, is easier, so the numbers of one say nothing about the other
Cost     122,154,732 parameters; 2,000,000 steps of 128 images, 78.6 TFLOP each: 110 hours on one H100 or H200 at 40%
         of its bfloat16 peak (990 TFLOP/s): an estimate from counted products, not a measurement
Memory   at most 38 GiB by --mode=describe, in four microbatches; 134 GiB in one
Expect   the paper: 3.72 bits/dim on the old set. Not run here; scored as vdm_cifar10.py says
Equals   as vdm_cifar10.py, with the authors' 256 channels
Differs  as there, and the number of steps: 2,000,000 as in the paper; their configs/imagenet32.py has 10,000,000
"""

from ml_collections import ConfigDict

from configs import vdm_cifar10


def get_config() -> ConfigDict:
    """What differs from VDM's CIFAR-10."""
    config = vdm_cifar10.get_config()
    config.data.name = "downsampled_imagenet/32x32"
    config.unet.channels = 256
    config.train.num_steps = 2_000_000
    config.train.grad_accum = 4
    return config
