"""Turns a config, and the names in it, into objects and functions."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion import conditioning, data, learned_schedule, objectives, reverse, timesteps
from diffusion.data import validation
from diffusion.data.source import Splits
from diffusion.evaluation import bound
from diffusion.evaluation.features import Features
from diffusion.experiment import combination, init_from, names, rules
from diffusion.experiment import config as config_lib
from diffusion.experiment.init_from import Start
from diffusion.experiment.schema import KEYS, LOGGERS
from diffusion.learned_schedule import Learned
from diffusion.model import Model
from diffusion.networks import NETWORKS
from diffusion.networks.network import Network
from diffusion.reporting import loggers
from diffusion.reverse import Reverse
from diffusion.runtime import processes, randomness
from diffusion.schedules import Schedule
from diffusion.training import loop, optimizer
from diffusion.training import schedule as trained_schedule
from diffusion.training.step import Training, TrainState, initial_state
from diffusion.variances import X0Variance

ACCELERATOR_INCEPTION_BATCH = 64  # images that go through Inception at a time


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a config and the data's shape determine. Nothing here depends on training.

    Attributes:
        config: the config as given. The programs read their settings from it.
        image_shape: (H, W, C).
        p: the reverse process that is trained.
        start_schedule: the schedule; for a learned one, its state before training.
        training: the definition of a train step.
    """

    config: ConfigDict
    image_shape: tuple[int, int, int]
    p: Reverse
    start_schedule: Schedule
    training: Training

    @property
    def learns_schedule(self) -> bool:
        """Whether the schedule is trained with the network."""
        return names.parse(self.config.schedule.name).name == learned_schedule.NAME

    def model(self, params: PyTree, variance: str = "model", x0_variance: X0Variance | None = None) -> Model:
        """The model of these parameters, for evaluation, sampling and coding.

        Args:
            params: usually the EMA parameters.
            variance: "model" is the variance of training. With any other one, the network's second half, if it has one,
                is not read.
            x0_variance: the estimate that the optimal variance needs.

        Raises:
            ValueError: there is no such variance, the network lacks its output, or the optimal variance was not
                estimated.
        """
        of_any_mean = ["model", *(name for name, entry in reverse.VARIANCES.items() if not entry.is_learned)]
        if variance not in (*of_any_mean, self.p.variance):
            raise ValueError(f"the variance {variance!r} is not one of {', '.join(of_any_mean)}")
        p = self.p if variance == "model" else dataclasses.replace(self.p, variance=variance)
        schedule = self.training.schedule.of_params(params)
        if variance == "optimal":
            if x0_variance is None:
                raise ValueError(
                    "the optimal variance needs a trained mean; train first with eval.variance and sample.variance "
                    "something else, then use it in --mode=eval or --mode=sample"
                )
            schedule = dataclasses.replace(schedule, x0_variance=jnp.asarray(x0_variance.mean))
        denoise = jax.tree_util.Partial(Network(self.training.network, p.output_channels(self.image_shape[-1])), params)
        return Model(denoise, p, schedule, self.training.num_levels, self.training.conditional)

    @functools.cached_property
    def start(self) -> Start | None:
        """The parameters that config.init_from names; None for random ones. Raises the errors of `init_from.load`."""
        if not self.config.init_from:
            return None
        return init_from.load(self.config, self.training.network, self.abstract_state().params)

    def initial_state(self) -> TrainState:
        """The state before the first step: the weights of config.init_from, or random ones from config.seed."""
        if self.start and not self.start.anew:
            return initial_state(self.training, self.start.over({}), self.image_shape)
        # It runs once. On CPUs random numbers are slow to compile, so the program is not optimized there.
        options = {"xla_backend_optimization_level": 0} if runs_on_cpu() else None
        return self._state(jax.jit(self.training.network.init, compiler_options=options), self.start)

    def abstract_state(self) -> TrainState:
        """The shapes and dtypes of the state, without computing it."""
        return self._shapes

    @functools.cached_property
    def _shapes(self) -> TrainState:
        return jax.eval_shape(lambda: self._state(self.training.network.init))

    def _state(self, init: Callable, over: Start | None = None) -> TrainState:
        image = jnp.zeros((1, *self.image_shape))
        params = init(randomness.stream(self.config.seed, "init"), image, jnp.zeros(1))["params"]
        if self.learns_schedule:
            with jax.ensure_compile_time_eval():  # `init` checks its numbers, also while `abstract_state` is traced
                params = params | {learned_schedule.SUBTREE: learned_schedule.init(self.start_schedule)}
        params = over.over(params) if over else params
        return initial_state(self.training, params, self.image_shape)


def runs_on_cpu() -> bool:
    """Whether JAX's default device is a CPU. All code that differs on CPUs calls this function."""
    return jax.default_backend() == "cpu"


def describe_data(config: ConfigDict) -> data.Description:
    """The description of the config's data set. Raises the errors of `data.describe`."""
    return data.describe(config.data.name, config.data.data_dir, config.data.image_size, config.data.pad_to)


def load_data(config: ConfigDict, split: str) -> data.Source:
    """One of the `Splits` of the config's data set. Raises the errors of `load_splits`."""
    stored = _stored(config, "test" if split == "test" else "train")
    if split == "test":
        return stored
    train, aside = validation.split_off(stored, config.data.validation)
    return aside if split == "validation" else train


def load_splits(config: ConfigDict) -> Splits:
    """All splits of the config's data set, the same on all processes.

    Raises the errors of `data.load` and `validation.split_off`, and a ValueError if a process has other data.
    """
    splits = Splits(*validation.split_off(_stored(config, "train"), config.data.validation), _stored(config, "test"))
    place = f"data.name={config.data.name!r} in data.data_dir={config.data.data_dir!r}"
    processes.check_same(lambda: "".join(splits.sha256().values()), f"{place} must be the same set on all hosts")
    return splits


def _stored(config: ConfigDict, split: str) -> data.Source:
    of = config.data
    return data.load(of.name, split, of.data_dir, of.image_size, of.pad_to, of.decode)


def experiment(
    config: ConfigDict,
    image_shape: tuple[int, int, int],
    num_levels: int,
    num_classes: int = 0,
    on_cpu: bool | None = None,
) -> Experiment:
    """The experiment that `config` describes, for images [H, W, C] of `num_levels` pixel values.

    Args:
        num_classes: the number of classes of the images' labels; 0 for images without labels.
        on_cpu: whether it is compiled for a CPU; None means for JAX's default device.

    Raises:
        ValueError: something does not fit; one line names the config key.
    """
    config_lib.check(config)
    rules.check(config)
    rules.check_labels(config, num_classes)
    schedule, learned = combination.start_schedule(config)
    if learned is not None:
        learned_schedule.init(schedule)  # raises its ValueError now, not with the first state
    p = combination.reverse_process(config)
    times = objectives.TIMES.get(objective := names.parse(config.objective.name).name, "every_term")
    on_cpu = runs_on_cpu() if on_cpu is None else on_cpu
    of_params = combination.schedule_of(config, schedule, learned)
    network = _network(config, schedule, image_shape, p.output_channels(image_shape[-1]), num_classes, on_cpu)
    training = Training(
        network=network,
        objective=_objective(config, p, num_levels),
        timesteps=timesteps.make(_chosen(config, "objective.timesteps"), schedule, times),
        schedule=trained_schedule.make(of_params, learned and learned.inner, times),
        optimizer=_optimizer(config, learned),
        ema_decay=config.ema.decay,
        power_ema=config.ema.post_hoc,
        num_levels=num_levels,
        batch_size=config.train.batch_size,
        flip=config.data.flip,
        conditional=config.model.conditional,
        label_dropout=config.model.label_dropout,
        log_every=config.train.log_every,
        skip_nonfinite=config.train.skip_nonfinite > 0,
        grad_accum=config.train.grad_accum,
        unroll=on_cpu,
        probed=objective in objectives.PROBED,
    )
    return Experiment(config, image_shape, p, schedule, training)


def plan(config: ConfigDict) -> loop.Plan:
    """The plan of training: its length, and the steps at which something happens.

    A call has one step on the CPU backend, because gradients of convolutions are many times slower inside a loop there.
    """
    settings, fields = config.train, [field.name for field in dataclasses.fields(loop.Plan)]
    own = {name: settings[name] for name in fields if name in settings}
    own |= {"seed": config.seed, "quality_every": config.quality.every}
    return loop.Plan(**own | ({"steps_per_call": 1} if runs_on_cpu() else {}))


def logger(config: ConfigDict, directory: Path, step: int) -> loggers.Logger:
    """The receivers of the rows of metrics.jsonl from `step` on, in process 0 alone."""
    chosen = config.train.loggers if processes.is_first() else ()
    arguments = directory, step, config.to_dict()
    return loggers.together({text: functools.partial(LOGGERS.choice.bind(text), *arguments) for text in chosen})


def bound_settings(config: ConfigDict) -> bound.Settings:
    """The settings with which the bound is measured."""
    of = config.eval
    return bound.Settings(config.seed, of.batch_size, of.protocol, of.terms_per_image, of.noises_per_term)


def quality_features(config: ConfigDict, train_set: data.Source) -> Features:
    """The features by which samples are compared. Raises the errors of the functions in `evaluation.features`."""
    make = _chosen(config, "quality.features")
    if "batch_size" in inspect.signature(make).parameters and not runs_on_cpu():
        return make(train_set, batch_size=ACCELERATOR_INCEPTION_BATCH)
    return make(train_set)


def _chosen(config: ConfigDict, key: str):
    """The entry that a config key names, with its arguments bound."""
    group, _, name = key.partition(".")
    return KEYS[key].allowed.bind(config[group][name])


def _network(
    config: ConfigDict, start: Schedule, image_shape: tuple[int, ...], out_channels: int, num_classes: int, on_cpu: bool
) -> nn.Module:
    """The network module. Its fields come from the config group of its name; the arguments of model.network override
    them.

    If the config does not choose an algorithm for convolutions, a network that has Winograd's uses it on CPUs.
    """
    name, arguments = names.parse(config.model.network)
    takes = {field.name for field in dataclasses.fields(NETWORKS[name])}
    fields = dict(config.get(name, {})) | arguments
    if "convolution" in takes and fields.get("convolution", "auto") == "auto":
        fields["convolution"] = "winograd" if on_cpu else "xla"
    if config.model.conditional:
        if "num_classes" not in takes:
            raise ValueError(f"model.network={config.model.network!r} takes no labels; model.conditional must be False")
        fields |= {"num_classes": num_classes}
    if fields.get("wiener") and config.model.conditioning == "gamma":
        fields |= {"gamma_line": conditioning.gamma_line(start)}
    network = NETWORKS[name](**fields, out_channels=out_channels)
    network.check(image_shape)
    return network


def _objective(config: ConfigDict, p: Reverse, num_levels: int) -> objectives.Objective:
    name, arguments = names.parse(config.objective.name)
    weighting = _chosen(config, "objective.weighting")(p)
    return objectives.make(name, p, config.schedule.num_steps, num_levels, weighting, **arguments)


def _optimizer(config: ConfigDict, learned: Learned | None) -> optax.GradientTransformation:
    """The network's optimizer. A learned schedule has its own, so that neither gradient clips the other.

    The schedule's learning rate rises during the first half of training. Otherwise the schedule would leave to the
    decoder what the untrained network has not learned yet. Its gradient is not clipped: clipping moved γ_T from 20 to
    76 in 900 steps (docs/learned_schedule.md).
    """

    def make(rule: Callable, learning_rate: float, warmup_steps: int, grad_clip: float) -> optax.GradientTransformation:
        decay = _chosen(config, "optim.decay")
        return optimizer.make(rule, decay, learning_rate, config.train.num_steps, warmup_steps, grad_clip)

    def group_of(params: PyTree) -> dict[str, str]:
        return {name: "schedule" if name == learned_schedule.SUBTREE else "network" for name in params}

    rule, rate = _chosen(config, "optim.name"), config.optim.learning_rate
    network = make(rule, rate, config.optim.warmup_steps, config.optim.grad_clip)
    if learned is None:
        return network
    # Adam even if the network has AdamW, whose weight decay would pull γ towards 0.
    schedule = make(optimizer.adam, learned.learning_rate, config.train.num_steps // 2, grad_clip=0.0)
    return optax.partition({"network": network, "schedule": schedule}, group_of)
