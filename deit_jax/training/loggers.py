"""Where else a run's metrics and pictures go: TensorBoard's event files, Weights & Biases.

Both packages are optional. A logger writes metrics, texts and pictures of a step.
"""

import io
import time
import uuid
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from deit_jax import storage
from deit_jax.errors import InputError, brief
from deit_jax.training.log_file import LogFile

if TYPE_CHECKING:  # the step runs without ml_collections, which GPU hosts may lack
    from ml_collections import ConfigDict
    from PIL import Image

_WANDB_ID = "wandb_id"  # of the workdir: by this name a run goes on there


def check(config: "ConfigDict") -> None:
    """Raises InputError if a logger is wanted but missing."""
    if config.train.tensorboard:
        import_tensorboard()
    if config.train.wandb:
        import_wandb(config.train.wandb)


class EventFile:
    """Writes TensorBoard events with the tensorboard package's record writer, no TensorFlow."""

    def __init__(self, workdir: str, step: int, check: Callable[[], None]):
        """Opens a new file in the workdir of a run that begins at a step."""
        event_pb2, summary_pb2, record_writer = import_tensorboard()
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._metadata = summary_pb2.SummaryMetadata
        # Nanoseconds: a run that resumes within a second must not overwrite the earlier file.
        path = storage.path_of(workdir, f"events.out.tfevents.{time.time_ns()}")
        self._file = LogFile(path, check)
        self._writer = record_writer.RecordWriter(self._file)
        self._put(file_version="brain.Event:2")
        # Makes TensorBoard drop what a killed run wrote for the steps from the next one on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._put(step=step + 1, session_log=start)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes numbers by name."""
        self._show(step, *(self._summary.Value(tag=n, simple_value=v) for n, v in values.items()))

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text, which is shown as it is."""
        value = self._summary.Value(tag=name)
        value.metadata.plugin_data.plugin_name = "text"
        value.tensor.dtype = 7  # DT_STRING
        indented = "\n".join(f"    {line}" for line in text.splitlines())  # Markdown's for code
        value.tensor.string_val.append(indented.encode())
        self._show(step, value)

    def picture(self, step: int, name: str, picture: "Image.Image") -> None:
        """Writes a picture, as a JPEG."""
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=85)
        value = self._summary.Value(tag=name)
        value.image.width, value.image.height = picture.size
        value.image.colorspace = 3
        value.image.encoded_image_string = file.getvalue()
        self._show(step, value)

    def _show(self, step: int, *values: Any) -> None:
        self._put(step=step, summary=self._summary(value=values))
        self._writer.flush()

    def _put(self, **fields: object) -> None:
        event = self._event(wall_time=time.time(), **fields)
        self._writer.write(event.SerializeToString())

    def sync(self) -> None:
        """Waits until all is stored."""
        self._file.sync()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class Wandb:
    """Logs to a project of Weights & Biases; a run that resumes goes on in its run there."""

    def __init__(self, workdir: str, project: str):
        """Begins, or goes on; raises InputError if wandb is missing or does not start."""
        self._wandb = import_wandb(project)
        file = storage.path_of(workdir, _WANDB_ID)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            storage.replace_text(file, uuid.uuid4().hex[:12])
        name = file.read_text(encoding="utf-8").strip()
        try:
            self._run = self._wandb.init(project=project, id=name, name=workdir, resume="allow")
        except Exception as error:  # it raises those of several libraries
            raise InputError(
                f"config.train.wandb is {project!r}, but wandb does not start ({brief(error)}); "
                "run `wandb login`, set WANDB_MODE=offline, or set it to ''"
            ) from error

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs numbers by name."""
        self._run.log(values, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """Keeps a text in the run's config."""
        self._run.config.update({name: text}, allow_val_change=True)

    def picture(self, step: int, name: str, picture: "Image.Image") -> None:
        """Logs a picture."""
        self._run.log({name: self._wandb.Image(picture)}, step=step)

    def sync(self) -> None:
        """Does nothing: wandb uploads by itself."""

    def close(self) -> None:
        """Waits for the upload."""
        self._run.finish()


def import_tensorboard() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Imports TensorBoard's events, summaries and record writer; InputError if it is missing."""
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer import record_writer
    except ImportError as error:
        raise InputError(
            "config.train.tensorboard is True, but the tensorboard package is missing; "
            "pip install 'deit-jax[tensorboard]', or set it to False"
        ) from error
    return event_pb2, summary_pb2, record_writer


def import_wandb(project: str) -> ModuleType:
    """Imports wandb; InputError if it is missing."""
    try:
        import wandb
    except ImportError as error:
        raise InputError(
            f"config.train.wandb is {project!r}, but the wandb package is missing; "
            "pip install 'deit-jax[wandb]', or set it to ''"
        ) from error
    return wandb
