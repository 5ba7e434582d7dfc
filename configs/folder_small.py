"""A start for your own pictures on a CPU, at 32×32: docs/own_data.md.

    python -m diffusion.data.folder ~/photos --name=photos --size=32
    python main.py --config=configs/folder_small.py --config.data.name=photos --workdir=runs/photos

Data     what diffusion.data.folder prepared under data.name
Cost     1,114,822 parameters; 100 steps of 16 images with samples and estimated scores took 3:14 on 2 busy CPU cores
         (load 4 to 6, 2026-11-29): 46 s of compiling, then 1.7 steps per second. The 2,000 steps were not run
Expect   it depends on the pictures. After those 100 steps on 258 coloured digits: 6.37 ± 0.08 bits/dim on 15 test
         images (standard error, one seed), which is only a start
Paper    none: a recipe of this project, the digits' one with a third resolution and L_hybrid; not compared with others
"""

from ml_collections import ConfigDict

from configs import digits_fixed


def get_config() -> ConfigDict:
    """What differs from the base of the digits' studies."""
    config = digits_fixed.get_config()
    config.data.name = "photos"
    config.data.flip = True
    config.schedule.num_steps = 100
    config.unet.channel_mult = (1, 2, 2)
    config.unet.attention_resolutions = (8,)
    config.unet.fourier_features = ()
    config.objective.name = "hybrid"
    config.optim.learning_rate = 1e-3
    config.train.num_steps = 2000
    config.train.batch_size = 16
    config.train.checkpoint_every = 500
    config.train.validate_every = 100
    config.train.sample_every = 500
    config.eval.terms_per_image = 5
    config.sample.num_images = 16
    config.sample.method = "dpm_solver_pp"
    config.sample.num_steps = 25
    return config
