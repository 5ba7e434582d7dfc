"""The steps of training after which something happens."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Plan:
    """The length of training, and the intervals at which something happens; 0 is never. See the config group `train`.

    Rows are logged every `Training.log_every` steps.
    `steps_per_call` is 1 if several steps in one compiled call are slow: see `build.plan`.
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
        """Whether something with this interval happens after this step. Everything happens after the last step."""
        return step == self.num_steps or bool(every) and step % every == 0

    def draws(self, step: int) -> bool:
        """Whether samples are shown after this step. Those of the last step are drawn after training."""
        return step < self.num_steps and self.is_due(step, self.sample_every)

    def measures(self, step: int) -> bool:
        """Whether metrics of samples are computed after this step."""
        return bool(self.quality_every) and self.is_due(step, self.quality_every)

    def call_length(self, step: int, log_every: int) -> int:
        """The number of steps in the compiled call after this step: the most that a call may have, or 1.

        Each length needs a compilation, so there are only two lengths. No call goes beyond a step after which something
        happens; single steps fill what is left before it.
        """
        own = self.checkpoint_every, self.validate_every, self.sample_every, self.quality_every
        intervals = [interval for interval in (log_every, *own, self.check_replicas_every) if interval]
        longest = min([self.steps_per_call, self.num_steps, *intervals])
        left = min([self.num_steps - step, *(interval - step % interval for interval in intervals)])
        return longest if longest <= left else 1
