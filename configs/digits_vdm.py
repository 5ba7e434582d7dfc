"""The recipe of configs/vdm_cifar10.py on the digits: continuous time, γ as input, no downsampling.

    python main.py --config=configs/digits_vdm.py --workdir=runs/digits_vdm
    python -m experiments.bound_by_steps --workdir=runs/digits_vdm

Data     scikit-learn's, prepared on first use
Cost     278,634 parameters; 1,600 steps of 32 images
Expect   1.88 bits/dim on the 299 held-out images, where configs/digits_adam.py reaches 1.83, both with
         data.validation=0 (docs/vdm.md)
Equals   configs/vdm_cifar10.py: the continuous-time loss, both ends of γ learned, γ as the network's input, no
         downsampling, attention only in the middle, AdamW's β and decay, low-discrepancy t
Differs  v-prediction; γ starts at −7.5, because 17 pixel values lie 16 times farther apart than 256; the curve
         between the ends is trained, too; 32 channels, three blocks down and four up, no dropout, Fourier features
         with other exponents; learning rate and decay, gradient clip, EMA and batch are those of digits_fixed.py
"""

from ml_collections import ConfigDict

from configs import digits_fixed


def get_config() -> ConfigDict:
    """What differs from the base of the studies."""
    config = digits_fixed.get_config()
    config.schedule.name = "learned(start='linear_gamma(gamma_min=-7.5)', inner='second_moment')"
    config.schedule.num_steps = 1000  # of the curve, of sampling and scoring: T = 100 would cost 0.11 bits/dim more
    config.model.variance = "fixed_small"
    config.model.conditioning = "gamma"
    config.model.decoder = "bayes"
    config.objective.name = "vdm_continuous"
    config.unet.channel_mult = (1,)
    config.unet.num_res_blocks = 3
    config.unet.attention_resolutions = ()
    config.optim.name = "adamw(b2=0.99, weight_decay=0.01)"
    config.train.num_steps = 1600
    config.eval.terms_per_image = 25
    config.sample.num_steps = 50
    return config
