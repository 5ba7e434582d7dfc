"""The networks that predict the mean of the reverse process, as Flax modules.

A network's module is called as module(x_t [B, H, W, C], network_t [B], dropout_keys [B] or None) and returns
[B, H, W, out_channels]. Its fields are config keys: `unet.channels` is the field `channels` of "unet". The exception is
`out_channels`, which follows from the data and the variance. `check(image_shape)` refuses fields that do not fit.
A network with a field `num_classes` can be trained with labels. If that is not 0, it also takes labels=[B], the numbers
of the classes, or -1 for no label.
"""

from diffusion.networks.adm import ADM
from diffusion.networks.dit import DiT
from diffusion.networks.unet import UNet

# model.network -> the module's class.
NETWORKS = {"unet": UNet, "adm": ADM, "dit": DiT}
