"""The optimizer, from Optax."""

import optax


def adam(
    learning_rate: float, num_steps: int, warmup_steps: int = 0, decay: str = "constant", grad_clip: float = 0.0
) -> optax.GradientTransformation:
    """Adam with β = (0.9, 0.999), ε = 1e-8, behind a clip of the gradient's global norm. Ho et al. (2020), app. B.

    Args:
        learning_rate: the peak.
        num_steps: the length of training, for the decay.
        warmup_steps: the learning rate rises linearly from 0 over this many steps.
        decay: "constant", or "cosine" to 0 at the last step.
        grad_clip: the largest global norm of the gradient, before Adam sees it; 0 for no clip.
    """
    schedules = {
        "constant": optax.constant_schedule(learning_rate),
        "cosine": optax.cosine_decay_schedule(learning_rate, max(1, num_steps - warmup_steps)),
    }
    schedule = schedules[decay]
    if warmup_steps:
        ramp = optax.linear_schedule(0.0, learning_rate, warmup_steps)
        schedule = optax.join_schedules([ramp, schedule], [warmup_steps])
    clip = [optax.clip_by_global_norm(grad_clip)] if grad_clip else []
    return optax.chain(*clip, optax.adam(schedule, b1=0.9, b2=0.999, eps=1e-8))
