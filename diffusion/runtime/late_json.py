"""A JSON item of a checkpoint that is computed while the other items are written.

The digests of a state take longer than its copy. Computed here, they do not delay training, and a checkpoint still gets
its final name only after them. The file has the format of Orbax's JsonSave, so JsonRestore reads it.
"""

import dataclasses
import json
import threading
from collections.abc import Callable
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import future


class LateJsonHandler(ocp.JsonCheckpointHandler):
    """Writes a `LateJson` in a thread of its own."""

    async def async_save(self, directory, item=None, args: "LateJson | None" = None) -> list[future.Future]:
        async def write() -> None:
            args.may_begin.wait()
            (directory / "metadata").write_text(json.dumps(args.make()))

        return [future.CommitFutureAwaitingContractedSignals(write(), name="late_json")]


@ocp.args.register_with_handler(LateJsonHandler, for_save=True)
@dataclasses.dataclass
class LateJson(ocp.args.CheckpointArgs):
    """The result of `make` as JSON. `make` is called in another thread, after `begin`.

    If it started earlier, it would slow down the copy of the other items, for which training waits.
    """

    make: Callable[[], dict[str, Any]]
    may_begin: threading.Event = dataclasses.field(default_factory=threading.Event)

    def begin(self) -> None:
        self.may_begin.set()


@ocp.args.register_with_handler(LateJsonHandler, for_restore=True)
@dataclasses.dataclass
class LateJsonRestore(ocp.args.CheckpointArgs):
    """Reads the item that `LateJson` wrote."""
