"""Ho, Jain & Abbeel (2020) on CelebA-HQ 256×256: six levels, attention at 16×16.

    python main.py --config=configs/celebahq256.py --workdir=runs/celebahq256

Data     celeb_a_hq/256 as TFDS prepared it: only a training split of 30,000 pictures. Every twentieth is held out here
Weights  the network has the layout of the published google/ddpm-celebahq-256: --config.init_from, docs/cifar10.md
Cost     113,673,219 parameters; 500,000 steps of 64 images, 492 GFLOP per image and forward pass
Memory   25 GiB compiled for one H100 (benchmarks.compiled, 2026-11-27), because a batch goes through the network in
         four microbatches; at most 68 GiB by --mode=describe
Expect   the paper gives pictures, but neither FID nor bits per dimension; not run here
Equals   the paper and its code (run_celebahq.py): network, schedule, loss, Adam, warm-up, batch, flips, no
         dropout, and samples drawn with the variance β̃_t, where the code for CIFAR-10 uses β_t
Differs  the code trains on all 30,000 pictures; gradient clip, Adam's ε and FID as in cifar10.py
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config() -> ConfigDict:
    """What differs from CIFAR-10; lsun256 starts from here."""
    config = cifar10.get_config()
    config.data.name = "celeb_a_hq/256"
    config.model.variance = "fixed_small"
    config.unet.channel_mult = (1, 1, 2, 2, 4, 4)
    config.unet.dropout = 0.0
    config.optim.learning_rate = 2e-5
    config.train.num_steps = 500_000
    config.train.batch_size = 64
    config.train.grad_accum = 4  # 25 GiB on one H100; with 2: 47; with 1: 64, too much. Use 1 on four or more devices
    config.train.monitor_images = 64
    config.eval.batch_size = 64
    config.eval.num_images = 256
    config.eval.terms_per_image = 9  # all: 1,000 passes through the network per image
    config.sample.num_images = 16
    config.sample.num_previews = 16
    config.sample.batch_size = 16
    return config
