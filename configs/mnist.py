"""MNIST on a CPU: 28×28 digits in a black frame of 32×32.

    python main.py --config=configs/mnist.py --workdir=runs/mnist

Data     mnist as TFDS prepared it, in ArrayRecord format
Cost     280,898 parameters; 2,000 steps of 32 images
Expect   not run yet. Bits per dimension are per pixel of picture and frame; times 32²/28², they are per picture pixel
Paper    none: the recipe of digits_fixed.py
"""

from ml_collections import ConfigDict

from configs import digits_fixed


def get_config() -> ConfigDict:
    """What differs from the small digits."""
    config = digits_fixed.get_config()
    config.data.name = "mnist"
    config.data.pad_to = 32
    config.unet.channels = 16
    config.unet.channel_mult = (1, 2, 2)
    config.unet.attention_resolutions = (8,)
    config.unet.fourier_features = (7, 8)
    config.train.num_steps = 2000
    config.eval.num_images = 100
    return config
