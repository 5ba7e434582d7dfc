"""Ho & Salimans (2022) at the size of CIFAR-10: one network with and without labels, for classifier-free guidance.

    python main.py --config=configs/cifar10_conditional.py --workdir=runs/cifar10_conditional
    python main.py --config=configs/cifar10_conditional.py --workdir=runs/cifar10_conditional --mode=sample \
        --config.sample.guidance=0.3

Data     official CIFAR-10 (163 MB, downloaded once), or a directory prepared by TFDS: --config.data.data_dir=DIR
Cost     35,751,427 parameters; 800,000 steps of 128 images, as configs/cifar10.py; a guided sample takes two forward
         passes per step
Expect   nothing is published at this size, and it was not trained here. The paper on ImageNet 64×64, with 10% of the
         labels dropped (table 1): FID 1.80 unguided, 1.55 at w = 0.1, 3.03 at w = 0.3, 12.6 at w = 1
Equals   the paper: 10% of the labels dropped, ε-prediction, the simple loss without a weight on t, one network for
         both
Differs  T = 1000 steps and Nichol & Dhariwal's cosine instead of continuous time and a log SNR that follows a
         cosine; a fixed variance instead of an interpolated one; the data, and Ho et al.'s network for them
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config() -> ConfigDict:
    """What differs from Ho et al.'s CIFAR-10 experiment."""
    config = cifar10.get_config()
    config.schedule.name = "cosine"
    config.model.conditional = True
    config.model.label_dropout = 0.1
    config.sample.num_images = 100
    config.sample.num_previews = 100
    config.quality.features = "inception"
    return config
