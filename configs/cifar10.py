"""Ho, Jain & Abbeel (2020) on CIFAR-10: L_simple, ε-prediction, fixed variance.

    python main.py --config=configs/cifar10.py --workdir=runs/cifar10

Data     official CIFAR-10 (163 MB, downloaded once), or a directory prepared by TFDS: --config.data.data_dir=DIR
Cost     35,746,307 parameters; 800,000 steps of 128 images; about 35 GFLOP per image and step
Expect   the paper: 3.75 bits/dim on test (3.72 on train), FID 3.17; not yet reproduced here

Every key that exists is in this file; other configs start from it and change what differs. A name may carry
arguments of the function that it names, as in "linear(beta_end=0.03)".
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config; the numbers are the paper's unless a comment says otherwise."""
    config = ConfigDict()
    config.seed = 0
    config.init_from = ""  # a directory with published weights (config.json and safetensors); "": random ones

    config.data = ConfigDict()
    config.data.name = "cifar10"  # or "digits", or any image set that TFDS prepared as ArrayRecord
    config.data.data_dir = ""  # "": the default of TFDS, ~/tensorflow_datasets
    config.data.image_size = 0  # N: the centre square of every picture is resized to N×N; 0: as it is
    config.data.pad_to = 0  # N: black is added around every picture up to N×N; 0: none
    config.data.placement = "auto"  # of the training images: devices, disk, or by the devices' free memory
    config.data.flip = True

    config.schedule = ConfigDict()
    # linear(beta_end=0.02), cosine, quadratic, constant, warmup, harmonic, linear_gamma(gamma_min=-13.3), or
    # learned(start='cosine', inner='bound')
    config.schedule.name = "linear"
    config.schedule.num_steps = 1000

    config.model = ConfigDict()
    config.model.network = "unet"  # its fields are the keys of the group of its name
    config.model.prediction = "eps"  # eps, x0, v, mean
    config.model.variance = "fixed_large"  # fixed_small, fixed_large, learned, learned_range
    config.model.conditioning = "t"  # what the network is told of the noise: t, or gamma (γ_t = −log SNR)
    config.model.decoder = "network"  # p(x_0 | x_1): what the network says, or bayes (in proportion to q(x_1 | x_0))
    config.model.conditional = False  # True: the network is given the data's labels
    config.model.label_dropout = 0.0  # the part of the training images whose label it is not given; for guidance

    config.unet = ConfigDict()
    config.unet.channels = 128
    config.unet.channel_mult = (1, 2, 2, 2)
    config.unet.num_res_blocks = 2
    config.unet.attention_resolutions = (16,)
    config.unet.mid_attention = True
    config.unet.num_groups = 32
    config.unet.num_heads = 1
    config.unet.dropout = 0.1
    config.unet.scale_shift_norm = False
    config.unet.fourier_features = ()
    config.unet.dtype = "float32"  # bfloat16: products and maps in bf16, parameters and losses in float32
    config.unet.remat = False

    config.objective = ConfigDict()
    config.objective.name = "simple"  # simple, vlb, hybrid(vlb_weight=0.001), vdm, vdm_continuous
    config.objective.weighting = "none"  # of the simple loss: none, p2(gamma=1), min_snr(gamma=5)
    config.objective.timesteps = "uniform"  # uniform, low_discrepancy, loss_aware(history_length=10)

    config.optim = ConfigDict()
    config.optim.name = "adam"  # adam(b2=0.999, eps=1e-8), adamw(weight_decay=0.01)
    config.optim.learning_rate = 2e-4
    config.optim.warmup_steps = 5000
    config.optim.decay = "constant"  # constant, cosine(end=0.0)
    config.optim.grad_clip = 1.0  # of the network; a learned schedule is not clipped

    config.ema = ConfigDict()
    config.ema.decay = 0.9999

    config.train = ConfigDict()
    config.train.num_steps = 800_000
    config.train.batch_size = 128  # over all devices
    config.train.grad_accum = 1  # microbatches in which a device's share goes through the network
    config.train.steps_per_call = 10  # steps per compiled call on accelerators; the CPU takes one
    config.train.log_every = 100
    config.train.checkpoint_every = 5000
    config.train.keep_checkpoints = 3
    config.train.sample_every = 50_000  # 0: only at the end
    config.train.monitor_images = 256  # test images whose loss is followed and ranks the checkpoints; at most all
    config.train.skip_nonfinite = 0  # how many updates with a NaN or Inf are left out before it stops
    config.train.check_replicas_every = 1000  # steps after which all devices must hold the same state; 0: never

    config.eval = ConfigDict()
    config.eval.num_images = 0  # of the test set, and as many of the training set; 0: all of the test set
    config.eval.batch_size = 256  # pairs of image and t at a time, over all devices
    config.eval.protocol = "exact"  # ho2020: the decoder's CDF and the number of images of the original code
    config.eval.variance = "model"  # model (its own), fixed_small, fixed_large, optimal
    config.eval.terms_per_image = 0  # 0: all; fewer: an odd number, for an estimate with its standard error

    config.sample = ConfigDict()
    config.sample.num_images = 64
    config.sample.num_previews = 64  # of these, how many the grid shows
    config.sample.batch_size = 256
    config.sample.method = "ancestral"  # ancestral, ddim(eta=0.0); for few steps dpm_solver_pp, heun
    config.sample.num_steps = 0  # 0: all; fewer: evenly spaced
    config.sample.variance = "model"  # of ancestral: model (its own), fixed_small, fixed_large, optimal
    config.sample.labels = ()  # of a conditional network's images, in turn; (): every class
    config.sample.guidance = 0.0  # w of (1 + w) ε_c − w ε_u; 0: the conditional network as it is
    config.sample.guidance_interval = ()  # (low, high): guidance only where low < t ≤ high

    config.quality = ConfigDict()
    config.quality.num_images = 10_000  # samples that --mode=quality draws; published distances take 50,000
    config.quality.features = "pixels"  # pixels, inception (FID), classifier (of the data's own labels)
    config.quality.reference = "train"  # train, test, or an .npz file with mu and sigma
    config.quality.every = 0  # steps of training after which samples are scored, into metrics.jsonl; 0: never

    config.compress = ConfigDict()
    config.compress.batch_size = 64  # images that the network sees at once; the file says it to --mode=decompress
    config.compress.precision = 3  # of the latents: 2³ values to the smaller standard deviation; the file says it, too
    return config.lock()
