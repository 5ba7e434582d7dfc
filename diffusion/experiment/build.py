"""From a config to objects: here names become functions, and the network becomes one."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from diffusion import config as config_lib
from diffusion import interop, learned_schedule, objectives, optim, randomness, reverse, schedules, state, timesteps
from diffusion.reverse import Reverse
from diffusion.schedules import Schedule
from diffusion.state import TrainState
from diffusion.step import Training, losses
from diffusion.unet import UNet
from diffusion.variances import X0Variance


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a config and the data's shape determine; nothing here depends on training."""

    config: ConfigDict
    image_shape: tuple[int, int, int]
    num_levels: int
    initial_schedule: Schedule  # for ever, unless it is learned
    schedule_params: dict[str, PyTree]  # of a learned schedule, as it starts; {} for a fixed one
    p: Reverse
    unet: UNet
    training: Training
    published: PyTree | None  # the parameters in config.init_from, where training starts
    x0_variance: X0Variance | None = None  # what the optimal variance needs, if that is p's

    @property
    def schedule(self) -> Schedule:
        """The schedule, where it does not depend on the parameters.

        Raises:
            ValueError: it is learned.
        """
        if self.schedule_params:
            raise ValueError("a learned schedule belongs to its parameters: use schedule_of(params)")
        return self.initial_schedule

    def schedule_of(self, params: PyTree) -> Schedule:
        """The schedule that belongs to the parameters; they matter only if it is learned."""
        schedule = self.training.schedule_of(params)
        if self.x0_variance is None:
            return schedule
        return dataclasses.replace(schedule, x0_variance=jnp.asarray(self.x0_variance.mean))

    def with_fixed_schedule(self, params: PyTree) -> "Experiment":
        """The schedule that the parameters have learned, held fixed: for studies of a checkpoint, not for training."""
        schedule = self.training.schedule_of(params)
        training = dataclasses.replace(self.training, schedule_of=lambda _: schedule, inner_schedule=None)
        return dataclasses.replace(self, initial_schedule=schedule, schedule_params={}, training=training)

    def denoiser(self, params: PyTree) -> Callable[[Array, Array], Array]:
        """The network as the math wants it: (x_t [B, H, W, C], network_t [B]) -> output, as `p` reads it."""
        channels = self.p.output_channels(self.image_shape[-1])
        # Flax passes over the parameters of a learned schedule, which are none of the network's modules.
        return lambda x_t, network_t: self.unet.apply({"params": params}, x_t, network_t)[..., :channels]

    def with_variance(self, variance: str, x0_variance: X0Variance | None = None) -> "Experiment":
        """The same network under another variance, for scoring and sampling; "model" is the one it was trained with.

        Where the network has a second half and the variance is not learned, that half is not read.

        Raises:
            ValueError: the optimal variance is wanted, and nothing is known of it.
        """
        if variance == "model":
            return self
        if variance == "optimal" and x0_variance is None:
            raise ValueError(
                "the optimal variance needs a trained mean; train first with eval.variance and sample.variance "
                "something else, then use it in --mode=eval or --mode=sample"
            )
        return dataclasses.replace(self, p=reverse.make(self.p.prediction, variance), x0_variance=x0_variance)

    def initial_state(self) -> TrainState:
        """The state before the first step: the weights of config.init_from, or random ones from config.seed."""
        if self.published is not None:
            return self._state(lambda *_: {"params": self.published})
        # It runs once, so on the CPU, where random numbers are slow to compile, it is not optimized.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        return self._state(jax.jit(self.unet.init, compiler_options=options))

    def abstract_state(self) -> TrainState:
        """The shapes and dtypes of the state, without computing it."""
        return jax.eval_shape(lambda: self._state(self.unet.init))

    def _state(self, init: Callable) -> TrainState:
        image = jnp.zeros((1, *self.image_shape))
        params = init(randomness.stream(self.config.seed, "init"), image, jnp.zeros(1))["params"] | self.schedule_params
        keys = jax.random.split(jax.random.key(0), 1)
        _, parts = jax.eval_shape(
            lambda: losses(self.training, params, jnp.ones(1, jnp.int32), keys, image, dropout=False)
        )
        memory = self.training.timesteps.init(self.training.problem.num_steps)
        skipped = ("skipped",) if self.training.skip_nonfinite else ()
        return state.create(params, self.training.optimizer, memory, ("loss", *parts, "grad_norm", *skipped))


def experiment(config: ConfigDict, image_shape: tuple[int, int, int], num_levels: int) -> Experiment:
    """The experiment that `config` describes, for images [H, W, C] of `num_levels` grey levels.

    Raises:
        ValueError: anything that does not fit, in one sentence that names the config key.
    """
    config_lib.check(config)
    is_learned = config.schedule.name == learned_schedule.NAME
    fixed = config.schedule.start if is_learned else config.schedule.name
    schedule = schedules.SCHEDULES[fixed](config.schedule.num_steps)
    schedule_params = {learned_schedule.SUBTREE: learned_schedule.init(schedule)} if is_learned else {}
    p = reverse.make(config.model.prediction, config.model.variance)
    unet = UNet(**config.unet, out_channels=p.output_channels(image_shape[-1]))
    unet.check(image_shape)
    published = _published(config, unet, image_shape) if config.init_from else None

    def apply(params: PyTree, x_t: Array, network_t: Array, dropout_keys: Array | None) -> Array:
        return unet.apply({"params": params}, x_t, network_t, dropout_keys is not None, dropout_keys)

    training = Training(
        apply=apply,
        objective=objectives.OBJECTIVES[config.objective.name],
        problem=objectives.Problem(
            p, schedule.num_steps, num_levels, objectives.WEIGHTINGS[config.objective.weighting]
        ),
        timesteps=timesteps.SAMPLERS[config.objective.timesteps],
        schedule_of=learned_schedule.of_params if is_learned else lambda params: schedule,
        inner_schedule=config.schedule.inner if is_learned else None,
        optimizer=_optimizer(config),
        ema_decay=config.ema.decay,
        seed=config.seed,
        batch_size=config.train.batch_size,
        flip=config.data.flip,
        log_every=config.train.log_every,
        skip_nonfinite=config.train.skip_nonfinite > 0,
        grad_accum=config.train.grad_accum,
        unroll=jax.default_backend() == "cpu",
    )
    return Experiment(config, image_shape, num_levels, schedule, schedule_params, p, unet, training, published)


def _optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Adam; a learned schedule has one of its own, so that the norms of the two gradients do not clip each other.

    Its rate rises until half of the training is over: an untrained network would have the schedule leave to the
    decoder what it has not learned yet.
    """
    network = optim.adam(num_steps=config.train.num_steps, **config.optim)
    if config.schedule.name != learned_schedule.NAME:
        return network
    own = {"learning_rate": config.schedule.learning_rate, "warmup_steps": config.train.num_steps // 2}
    schedule = optim.adam(num_steps=config.train.num_steps, **config.optim.to_dict() | own)
    group = lambda params: {name: "schedule" if name == learned_schedule.SUBTREE else "network" for name in params}  # noqa: E731
    return optax.partition({"network": network, "schedule": schedule}, group)


def _published(config: ConfigDict, unet: UNet, image_shape: tuple[int, int, int]) -> PyTree:
    """The parameters in config.init_from, if they are those of the config's network."""
    theirs, params = interop.load_diffusers(config.init_from)
    prefix = f"init_from={config.init_from!r} holds another network than the config's"
    weightless = {"dropout", "dtype", "remat"}
    differing = [
        f"unet.{field}: {getattr(theirs, field)!r} there, {getattr(unet, field)!r} here"
        for field in [*config.unet, "out_channels"]
        if field not in weightless and getattr(theirs, field) != getattr(unet, field)
    ]
    if differing:
        raise ValueError(f"{prefix}: {'; '.join(differing)}")
    # Equal fields still mean another network where the images have another size or other channels.
    like = jax.eval_shape(unet.init, jax.random.key(0), jnp.zeros((1, *image_shape)), jnp.zeros(1))["params"]
    found, wanted = (
        {"/".join(path): leaf.shape for path, leaf in flatten_dict(tree).items()} for tree in (params, like)
    )
    if names := sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)):
        raise ValueError(f"{prefix}, whose images are {image_shape}: {', '.join(names)} differ")
    return params
