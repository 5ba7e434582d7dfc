"""When what happens between the steps of training."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long training is, and what happens when between its steps; 0 is never. See the config group `train`.

    Rows are logged every `Training.log_every` steps.
    `steps_per_call` is 1 where several steps in one compiled call are slow: see `build.plan`.
    """

    seed: int
    num_steps: int
    steps_per_call: int
    checkpoint_every: int
    validate_every: int
    sample_every: int
    quality_every: int
    check_replicas_every: int
    skip_nonfinite: int

    def is_due(self, step: int, every: int) -> bool:
        """Whether what happens every so many steps happens after this one; at the last step all does."""
        return step == self.num_steps or bool(every) and step % every == 0

    def draws(self, step: int) -> bool:
        """Whether samples are shown after this step; those of the last step are drawn when training is over."""
        return step < self.num_steps and self.is_due(step, self.sample_every)

    def measures(self, step: int) -> bool:
        """Whether metrics of samples are computed after this step."""
        return bool(self.quality_every) and self.is_due(step, self.quality_every)

    def call_length(self, step: int, log_every: int) -> int:
        """How many steps the compiled call after this step takes: as many as a call may have, or 1.

        Each length is a compilation, so there are two. No call goes beyond a step after which something happens: what
        is left before it is made of single steps.
        """
        own = self.checkpoint_every, self.validate_every, self.sample_every, self.quality_every
        intervals = [interval for interval in (log_every, *own, self.check_replicas_every) if interval]
        longest = min([self.steps_per_call, self.num_steps, *intervals])
        left = min([self.num_steps - step, *(interval - step % interval for interval in intervals)])
        return longest if longest <= left else 1
