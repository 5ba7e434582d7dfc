"""Ho, Jain & Abbeel (2020) on LSUN 256×256, bedrooms; other keys select churches and cats.

    python main.py --config=configs/lsun256.py --workdir=runs/bedroom
    python main.py --config=configs/lsun256.py --workdir=runs/church \
        --config.data.name=lsun/church_outdoor --config.data.flip=True --config.train.num_steps=1_200_000

Data     lsun/bedroom as TFDS prepared it: 3 million pictures, which take 600 GB when decoded. Their centre squares are
         resized to 256×256
Cost     113,673,219 parameters; 2,400,000 steps of 64 images (church 1.2M, cat 1.8M)
Memory   as celebahq256.py
Expect   the paper: FID 6.36 for bedrooms, 7.89 for churches, 19.75 for cats; not run here
Equals   as celebahq256.py; flips as in the paper
Differs  from the code (run_lsun.py): its comments mirror bedrooms but not cats; the paper mirrors all but bedrooms.
         Its pictures are made by StyleGAN2's dataset_tool; ours are centre squares, resized by area averages. 256 of
         the 300 bedrooms of TFDS' validation split are scored (eval.num_images=0: all)
"""

from ml_collections import ConfigDict

from configs import celebahq256


def get_config() -> ConfigDict:
    """What differs from CelebA-HQ."""
    config = celebahq256.get_config()
    config.data.name = "lsun/bedroom"
    config.data.image_size = 256
    config.data.flip = False  # the paper mirrors all but bedrooms
    config.train.num_steps = 2_400_000
    return config
