"""How the child processes of one step are run: limits, threads, and the lock they inherit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelmint.host import host
from modelmint.isolate import Limits, Outcome, Progress, call

if TYPE_CHECKING:
    from modelmint.step import Context, Workspace

MEMORY_SHARE = 0.9
"""Of the machine's memory a child may use, where the settings name no limit."""


@dataclass(frozen=True)
class Sandbox:
    """Runs functions of ours in child processes, all under the same conditions.

    Attributes:
        threads: what tools may use.
        limits: wall-clock and memory of each child.
        lock: descriptor of the step's lock; None outside of a step.
        require_isolation: refuse to run where the child cannot be cut off from the network.
        on_progress: told how far the child is.
    """

    threads: int
    limits: Limits
    lock: int | None = None
    require_isolation: bool = False
    on_progress: Callable[[Progress], None] | None = None

    def call(
        self,
        function: str,
        arguments: Mapping[str, Any],
        *,
        python_path: tuple[Path, ...] = (),
        cwd: Path | None = None,
    ) -> Outcome:
        """Run ``module:function`` with keyword arguments in a child without network.

        Raises:
            ToolError: if the child crashed, hung or answered nothing.
            ResourceError: if it went over a limit.
        """
        return call(
            function,
            arguments,
            limits=self.limits,
            keep_fds=() if self.lock is None else (self.lock,),
            python_path=python_path,
            on_progress=self.on_progress,
            require_isolation=self.require_isolation,
            environment={"OMP_NUM_THREADS": str(self.threads)},
            cwd=cwd,
        )


def sandbox(context: "Context", workspace: "Workspace", threads: int = 0) -> Sandbox:
    """The conditions under which the children of one step run.

    Args:
        context: its settings give the limits.
        workspace: its lock is inherited by the children.
        threads: what a recipe asks for; 0 for what the settings say.
    """
    settings = context.settings
    return Sandbox(
        threads=settings.tool_threads(threads),
        limits=Limits(
            wall_seconds=settings.step_seconds,
            memory_bytes=settings.step_memory_bytes or int(MEMORY_SHARE * host().memory_bytes),
        ),
        lock=workspace.lock,
        require_isolation=settings.require_isolation,
        on_progress=context.on_progress,
    )
