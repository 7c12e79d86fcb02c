"""Reports a run's metrics: metrics.jsonl, other loggers and console lines."""

import json
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from deit_jax import storage
from deit_jax.training import loggers
from deit_jax.training.log_file import LogFile

if TYPE_CHECKING:
    from PIL import Image

_NO_VALUES = ("step", "epoch", "seconds", "split", "data")  # of a line


class MetricWriter:
    """Writes the metrics of a run from one process; the others get a writer that is off.

    `metrics.jsonl` holds one object a line: `step`, `epoch` where it is known, `seconds` since this
    start, `split` ("train", "eval", "final") and the values; that of an evaluation also `data`, a
    digest of what it showed. A run that resumes at `resume_step` first drops the later lines, since
    it writes them again. Without `resume_step` lines are only appended. `beside` a training run,
    whose lines they must not touch (NFS and buckets cannot append from two hosts), they go to a
    file of their own, metrics.TIME.jsonl.

    Attributes:
      evaluation: the line of the evaluation at `resume_step`; {} where there is none.
    """

    def __init__(
        self,
        workdir: str,
        *,
        resume_step: int | None = None,
        steps_per_epoch: int = 0,
        tensorboard: bool = False,
        wandb: str = "",
        beside: bool = False,
        check: Callable[[], None] = lambda: None,
        on: bool = True,
    ):
        """Opens WORKDIR/metrics.jsonl; raises InputError if a logger is wanted but missing.

        `check` raises where the run must not write any more; it is asked at each line.
        """
        self._file, self._loggers = None, []
        self.evaluation: dict = {}
        self._check = check
        self._begin, self._steps_per_epoch = time.monotonic(), steps_per_epoch
        if tensorboard:
            loggers.import_tensorboard()
        if wandb:
            loggers.import_wandb(wandb)
        if not on:
            return
        path = storage.path_of(workdir, "metrics.jsonl")
        if resume_step is not None and path.exists():
            for line in _drop_lines_after(path, resume_step):
                if (line["step"], line.get("split")) == (resume_step, "eval"):
                    self.evaluation = line
        if resume_step is None and (beside or storage.is_remote(path)):
            path = path.with_name(f"metrics.{time.time_ns()}.jsonl")
        self._file = LogFile(path, check)
        if tensorboard:
            self._loggers.append(loggers.EventFile(workdir, resume_step or 0, check))
        if wandb:
            self._loggers.append(loggers.Wandb(workdir, wandb))

    def write(self, step: int, split: str, values: dict[str, float], *, data: str = "") -> None:
        """Appends one line; non-finite values become null, which JSON can hold."""
        if self._file is None:
            return
        self._check()
        numbers = {name: v if math.isfinite(v) else None for name, v in values.items()}
        line = {"step": step, "seconds": round(time.monotonic() - self._begin, 1), "split": split}
        if self._steps_per_epoch:
            line["epoch"] = round(step / self._steps_per_epoch, 3)
        if data:
            line["data"] = data
        line |= numbers
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        for logger in self._loggers:
            logger.write(step, {f"{split}/{name}": value for name, value in values.items()})

    @property
    def draws(self) -> bool:
        """Returns whether texts and pictures are kept anywhere."""
        return bool(self._loggers)

    def text(self, step: int, name: str, text: str) -> None:
        """Shows a text where there is a logger for it."""
        for logger in self._loggers:
            logger.text(step, name, text)

    def picture(self, step: int, name: str, picture: "Image.Image") -> None:
        """Shows a picture where there is a logger for it."""
        for logger in self._loggers:
            logger.picture(step, name, picture)

    def sync(self) -> None:
        """Waits until all is stored: a resumed run does not write it again."""
        for file in (self._file, *self._loggers):
            if file is not None:
                file.sync()

    def close(self) -> None:
        """Closes the files."""
        for file in (self._file, *self._loggers):
            if file is not None:
                file.close()


class Progress:
    """Measures speed and remaining time over the steps since the last report.

    The first step of a process, which compiles, is left out.
    """

    def __init__(self, *, batch_size: int, total_steps: int):
        """Starts before the first step; `batch_size` is global."""
        self._batch_size, self._total = batch_size, total_steps
        self._steps = 0
        self._wait = 0.0
        self._since: float | None = None

    def waited(self, seconds: float) -> None:
        """Adds time in which the step waited for input."""
        if self._since is not None:
            self._wait += seconds

    def step_done(self) -> None:
        """Counts a finished step."""
        if self._since is None:
            self._since = time.perf_counter()
        else:
            self._steps += 1

    def pause(self, seconds: float) -> None:
        """Leaves out time spent on something else, such as an evaluation."""
        if self._since is not None:
            self._since += seconds

    def report(self, step: int) -> dict[str, float]:
        """Returns images_per_second, input_wait (fraction of the time) and eta_seconds, if any."""
        if self._since is None or self._steps == 0:
            return {}
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        values = {
            "images_per_second": self._steps * self._batch_size / seconds,
            "input_wait": self._wait / seconds,
            "eta_seconds": (self._total - step) * seconds / self._steps,
        }
        self._since, self._steps, self._wait = now, 0, 0.0
        return values


def train_line(step: int, total_steps: int, steps_per_epoch: int, values: dict[str, float]) -> str:
    """Returns the console line of a train report; `values` as written to metrics.jsonl."""
    parts = [
        f"step {step}/{total_steps}",
        f"epoch {step / steps_per_epoch:.1f}",
        f"loss {values.get('loss', math.nan):.4f}",
    ]
    if "distill" in values:
        parts.append(f"(base {values['base']:.4f}, distill {values['distill']:.4f})")
    parts.append(f"lr {values['learning_rate']:.2e}")
    if "attention_max" in values:
        parts.append(f"attention max {values['attention_max']:.1f}")
    if "images_per_second" in values:
        parts.append(f"{values['images_per_second']:,.0f} images/s")
        parts.append(f"input wait {100 * values['input_wait']:.0f} %")
        parts.append(f"ETA {duration(values['eta_seconds'])}")
    if values["nonfinite_total"]:
        parts.append(f"{values['nonfinite_total']:.0f} non-finite steps skipped")
    if "skipped_images" in values:
        parts.append(f"{values['skipped_images']} unreadable images skipped")
    return " · ".join(parts)


def eval_line(results: dict[str, float]) -> str:
    """Returns the console line of an evaluation: every top-1, the loss and the count."""
    shown = [f"{name} {value:.2f}" for name, value in results.items() if "top1" in name]
    shown += [f"loss {results['loss']:.4f}", f"{results['num_examples']} images"]
    if "skipped_images" in results:
        shown.append(f"{results['skipped_images']} unreadable ones left out")
    return ", ".join(shown)


def accuracy_warning(results: dict[str, float]) -> str:
    """Returns a warning if `top1` is well below `expected_top1`; "" if not, or if none is known.

    Well below means by 2 points, or by half of a smaller expected value: repeated runs of one
    recipe differ by less.
    """
    expected = results.get("expected_top1")
    if expected is None or results["top1"] >= expected - min(2.0, expected / 2):
        return ""
    return (
        f"warning: top-1 is {results['top1']:.2f} where the published run had {expected:.2f} "
        "(config.train.expected_top1); compare the start-up summary with the recipe"
    )


def duration(seconds: float) -> str:
    """Returns seconds as 43s, 12m05s or 3h07m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def values_of(line: dict) -> dict[str, float]:
    """Returns the values of a line of metrics.jsonl, as they were written."""
    return {name: line[name] for name in line if name not in _NO_VALUES}


def _drop_lines_after(path: storage.Path, step: int) -> list[dict]:
    """Keeps the complete lines up to `step`, and returns them; drops one that a crash cut short."""
    kept, lines = [], []
    for text in storage.read_bytes(path).decode(errors="replace").splitlines():
        try:
            line = storage.parse_json(text)
            if line["step"] <= step:
                lines.append(line)
                kept.append(text + "\n")  # a crash may have cut off only the newline
        except (ValueError, KeyError, TypeError):
            continue
    storage.replace_text(path, "".join(kept))
    return lines
