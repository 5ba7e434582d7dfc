"""Kingma et al. (2021, "Variational Diffusion Models", VDM) on CIFAR-10 without augmentation, for low bits/dim.

    python main.py --config=configs/vdm_cifar10.py --workdir=runs/vdm_cifar10
    python -m experiments.bound_by_steps --workdir=runs/vdm_cifar10 --T=1000,10000,inf

Data     official CIFAR-10 (163 MB, downloaded once), or a directory prepared by TFDS: --config.data.data_dir=DIR
Cost     30,587,244 parameters; 10,000,000 steps of 128 images, 19.8 TFLOP each: 139 hours on one H100 or H200 at 40%
         of its bfloat16 peak (990 TFLOP/s): an estimate from counted products, not a measurement
Memory   at most 33 GiB by --mode=describe, in two microbatches; 66 GiB in one
Expect   the paper: 2.65 bits/dim without augmentation; its authors' code later 2.637. Not run here. Their code
         scores T = ∞ and does not clip x̂_0: 100 batches of 128 test images, an instant each. Here --mode=eval scores
         T = 1,000 and clips x̂_0; with --config.eval.protocol=vdm2021 it scores T = 1,000 and T = ∞ without a clip
Equals   the authors' code (google-research/vdm, configs/cifar10.py): the continuous-time loss without a clip, γ
         from −13.3 to 5, with both ends learned and linear between them (learned(inner='second_moment') also
         trains the curve), γ as the network's input, its depth and width, Fourier features, attention only in the
         middle, x_t added to the output, dropout, AdamW's settings, warm-up, no gradient clip, batch, EMA, no flips
Differs  bfloat16; pixel values at u/127.5 − 1 instead of bin centres; initialization, and biases where γ enters a
         block; biases are decayed, too; the two ends have their own Adam without decay, at a rate that rises to 5e-3
         instead of 2e-4
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config() -> ConfigDict:
    """What differs from Ho et al.'s CIFAR-10 experiment; vdm_imagenet32 starts from here."""
    config = cifar10.get_config()
    config.data.flip = False
    config.schedule.name = "learned(start='linear_gamma(gamma_min=-13.3, gamma_max=5.0)', inner='fixed')"
    config.model.variance = "fixed_small"
    config.model.conditioning = "gamma"
    config.model.decoder = "bayes"
    config.unet.channel_mult = (1,)
    config.unet.num_res_blocks = 32
    config.unet.attention_resolutions = ()
    config.unet.fourier_features = (7, 8)  # of 2^n·π; the authors' code has 2^n·2π, n = 6, 7
    config.unet.add_input = True
    config.unet.dtype = "bfloat16"
    config.objective.name = "vdm_continuous"
    config.objective.timesteps = "low_discrepancy"
    config.optim.name = "adamw(b1=0.9, b2=0.99, weight_decay=0.01)"
    config.optim.warmup_steps = 100
    config.optim.grad_clip = 0.0
    config.train.num_steps = 10_000_000
    config.train.grad_accum = 2
    config.eval.terms_per_image = 9  # all 1,000 terms of both splits would be 1e18 FLOP
    return config
