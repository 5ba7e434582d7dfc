"""Published models: the flags of OpenAI's checkpoints, Ho et al.'s network, and the paper's number for each.

The flags are from the READMEs of the original code. The bits/dim of Nichol & Dhariwal (2021), tables 1 and 2, are from
transcriptions that agree, and not from the paper itself.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion import schedules
from diffusion.interop import openai_flags
from diffusion.model import Model
from diffusion.networks.unet import UNet

# Flags that change neither outputs nor terms.
NO_MATTER = ("use_checkpoint", "use_fp16", "dropout", "rescale_learned_sigmas")


class Row(NamedTuple):
    """A published model.

    Attributes:
        names: the names of its files, without .pt.
        flags: its flags, as on the command line, with "package"; {} for a model without flags.
        data: data.name of the images that it was scored on; "" if there is no such data set here.
        test_bpd: the paper's bits/dim; None if it has none.
        source: the source of that number.
        protocol: the paper's protocol, one of `likelihood.PROTOCOLS`.
    """

    names: tuple[str, ...]
    flags: dict[str, str]
    data: str = ""
    test_bpd: float | None = None
    source: str = ""
    protocol: str = "nichol2021"


def flags_of(package: str, text: str) -> dict[str, str]:
    """The flags of a command line such as "--image_size 32 --learn_sigma True"."""
    words = text.replace("--", "").split()
    return {"package": package} | dict(zip(words[::2], words[1::2], strict=True))


def _improved(names: str, text: str, data: str = "", test_bpd: float | None = None, source: str = "") -> Row:
    source = f"Nichol & Dhariwal (2021), {source}" if source else ""
    return Row(tuple(names.split()), flags_of(openai_flags.IMPROVED, text), data, test_bpd, source)


def _guided(names: str, text: str) -> Row:
    return Row(tuple(names.split()), flags_of(openai_flags.GUIDED, text))


CIFAR10 = "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3 "
CIFAR10 += "--diffusion_steps 4000 --noise_schedule cosine "
IMAGENET64 = "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True "
IMAGENET64 += "--diffusion_steps 4000 --noise_schedule cosine "
OLD_IMAGENET64 = "downsampled_imagenet/64x64"
LSUN = "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True --diffusion_steps 1000 "
LSUN += "--use_scale_shift_norm False --attention_resolutions 16 --noise_schedule linear "
NO_RESCALING = "--rescale_learned_sigmas False --rescale_timesteps False "
ADM = "--attention_resolutions 32,16,8 --diffusion_steps 1000 --learn_sigma True --resblock_updown True "
ADM += "--use_scale_shift_norm True "
WIDE = ADM + "--noise_schedule linear --num_channels 256 --num_res_blocks 2 "

ROWS = [
    _improved("cifar10_uncond_50M_500K", CIFAR10, "cifar10", 3.17, "table 2, cosine, T = 4000, L_hybrid"),
    _improved(
        "cifar10_uncond_vlb_50M_500K", CIFAR10 + "--use_kl True", "cifar10", 2.94, "table 2, cosine, T = 4000, L_vlb"
    ),
    _improved(
        "imagenet64_uncond_100M_1500K", IMAGENET64, OLD_IMAGENET64, 3.57, "table 1, cosine, L_hybrid, 1.5M steps"
    ),
    _improved(
        "imagenet64_uncond_vlb_100M_1500K",
        IMAGENET64 + "--use_kl True",
        OLD_IMAGENET64,
        3.53,
        "table 1, cosine, L_vlb, 1.5M steps",
    ),
    _improved(
        "imagenet64_cond_270M_250K",
        IMAGENET64.replace("128", "192") + "--class_cond True " + NO_RESCALING,
    ),
    _improved("lsun_uncond_100M_1200K_bs128 lsun_uncond_100M_2400K_bs64", LSUN + NO_RESCALING),
    _guided(
        "64x64_diffusion",
        ADM + "--class_cond True --dropout 0.1 --image_size 64 --noise_schedule cosine --num_channels 192 "
        "--num_head_channels 64 --num_res_blocks 3 --use_new_attention_order True --use_fp16 True",
    ),
    _guided("128x128_diffusion", WIDE + "--class_cond True --image_size 128 --num_heads 4 --use_fp16 True"),
    _guided("256x256_diffusion", WIDE + "--class_cond True --image_size 256 --num_head_channels 64 --use_fp16 True"),
    _guided("256x256_diffusion_uncond", WIDE + "--image_size 256 --num_head_channels 64 --use_fp16 True"),
    _guided("512x512_diffusion", WIDE + "--class_cond True --image_size 512 --num_head_channels 64"),
    _guided(
        "lsun_bedroom lsun_cat lsun_horse",
        WIDE + "--image_size 256 --num_head_channels 64 --dropout 0.1 --use_fp16 True",
    ),
    _guided("lsun_horse_nodropout", WIDE + "--image_size 256 --num_head_channels 64 --use_fp16 True"),
]


def _vdm(data: str, test_bpd: float, of_program: str = "") -> Row:
    source = f"Kingma et al. (2021){', their program: ' if of_program else ''}{of_program}"
    return Row((), {}, data, test_bpd, source, "vdm2021")


# Models of google-research/vdm, by the values of these keys in its configs/*.py.
# The paper's numbers are as others cite them. The code's numbers are its README's, for the two public checkpoints.
VDM_KEYS = ("sm_n_embd", "sm_n_layer", "gamma_type", "with_attention")
VDM = {
    (128, 32, "learnable_scalar", False): _vdm("cifar10", 2.65, "2.637"),
    (256, 32, "learnable_nnet", False): _vdm("cifar10", 2.49, "2.522 without attention, both with augmentation"),
    (256, 32, "learnable_nnet", True): _vdm("cifar10", 2.49),
    (256, 32, "learnable_scalar", False): _vdm("downsampled_imagenet/32x32", 3.72),
    (256, 64, "learnable_scalar", False): _vdm("downsampled_imagenet/64x64", 3.40),
}
HO2020 = Row((), {}, "cifar10", 3.75, "Ho et al. (2020), table 1, L_simple", "ho2020")


def is_ho2020(model: Model) -> bool:
    """Whether it has Ho et al.'s network for CIFAR-10 and their process, with any weights."""
    network, p, wanted = model.denoise.func.module, model.p, schedules.linear(1000)
    same_process = (p.prediction, p.variance) == ("eps", "fixed_large") and model.schedule.num_steps == wanted.num_steps
    return same_process and network.copy(dropout=0.1) == UNet() and np.allclose(model.schedule.beta, wanted.beta)


def by_name(name: str) -> Row | None:
    """The row of a file, by its name without .pt."""
    return next((row for row in ROWS if name in row.names), None)


def agrees(row: Row, flags: Mapping[str, Any]) -> bool:
    """Whether flags from `openai_flags.read` describe the row's model."""
    wanted = openai_flags.read(row.flags)
    return all(flags.get(name) == value for name, value in wanted.items() if name not in NO_MATTER)
