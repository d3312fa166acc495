"""Account for the time from the start of a training run to its first step."""

import time

_commands: dict[str, float] = {}
"""job → time, by the monotonic clock, at which the process of its command was started"""


def begin_command(job: str) -> None:
    """Let the first phase of a job's start begin with this process, which a command has started to run it."""
    import psutil

    _commands[job] = time.monotonic() - (time.time() - psutil.Process().create_time())


class StartTimes:
    """The seconds of each phase, in the order in which the phases ended."""

    def __init__(self, job: str = "") -> None:
        """job: the job that starts now; its first phase begins with its command, if one has started this process."""
        self.seconds: dict[str, float] = {}
        self._since = _commands.pop(job, time.monotonic())

    def end(self, phase: str) -> None:
        """Note how long a phase took, which began when the one before it ended. A repeated phase is added up."""
        now = time.monotonic()
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + now - self._since, 1)
        self._since = now

    def __str__(self) -> str:
        """A phrase such as `12 s to the first step: starting Ray 2 s, loading the model 3 s`."""
        phases = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in self.seconds.items() if seconds >= 0.5)
        return f"{sum(self.seconds.values()):.0f} s to the first step" + (f": {phases}" if phases else "")
