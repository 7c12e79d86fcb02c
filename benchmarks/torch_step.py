"""PyTorch's side of tools/benchmark.py: timm's model with the reference's step, in its own process.

A process of its own keeps the two frameworks from sharing threads, allocators and caches.
"""

import contextlib
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.programs import CLASSES, Turn, Work
from deit_jax.errors import InputError, brief
from deit_jax.models import registry
from deit_jax.models.info import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    import torch


class Opponent:
    """A process with PyTorch's program of `work` on `device`, which waits for its turns.

    Raises:
      InputError: PyTorch cannot do the work, for instance because it has no compiler.
    """

    def __init__(self, work: Work, device: Literal["cpu", "cuda"], *, compiled: bool):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, work, device, compiled)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.first_s: float = self._receive()  # building, compiling and the first step
        except BaseException:
            self.close()
            raise

    def turn(self, count: int) -> Turn:
        """Times `count` steps."""
        self._connection.send(count)
        return self._receive()

    def peak_memory(self) -> int | None:
        """Bytes that PyTorch's allocator had on a GPU at most; None on CPU."""
        self._connection.send(0)
        return self._receive()

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise InputError("PyTorch's process ended; its own report is above") from None
        if isinstance(answer, str):
            raise InputError(f"PyTorch: {answer}")
        return answer


def _serve(connection: Connection, work: Work, device: str, compiled: bool) -> None:
    try:
        begin = time.perf_counter()
        step, wait, peak_memory = _program(work, device, compiled)
        step()
        wait()
        connection.send(time.perf_counter() - begin)
        with contextlib.suppress(EOFError):
            while True:
                count = connection.recv()
                if not count:
                    connection.send(peak_memory())
                    continue
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(count):
                    step()
                wait()
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                connection.send(Turn(wall / count, cpu / count))
    except Exception as error:  # of a compiler, of a driver: whatever it is, the parent reports it
        with contextlib.suppress(OSError):
            connection.send(brief(error))


def _program(
    work: Work, device_name: str, compiled: bool
) -> tuple[Callable[[], Any], Callable[[], None], Callable[[], int | None]]:
    """A step, what waits for it, and what tells the memory it took."""
    import torch

    device = torch.device(device_name)
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        # As XLA: float32 products may use TF32.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    else:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    peak = torch.cuda.max_memory_allocated if device.type == "cuda" else lambda: None
    if work.part == "train":
        _, step = train(work, device, compiled)
    else:
        step = _forward(work, device, compiled)
    return step, wait, peak


def timm_model(name: str, **options: Any) -> "torch.nn.Module":
    """timm's module for any name of our registry, also the few that timm has no name for."""
    from tests.oracles.torchvision_ops import import_torchvision

    import_torchvision()
    from timm.models import deit, regnet, vision_transformer

    ours = registry.model_options(name)
    if "w0" in ours:
        renamed = {"group_width": "group_size"}
        generator = {k: v for k, v in ours.items() if k != "image_size"}
        config = {renamed.get(k, k): v for k, v in generator.items()} | {"se_ratio": 0.25}
        return regnet.RegNet(regnet.RegNetCfg(**config), num_classes=CLASSES, **options)
    kind = vision_transformer.VisionTransformer
    if ours.get("distilled"):
        kind = deit.VisionTransformerDistilled
    renamed = {"image_size": "img_size", "layer_scale_init": "init_values"}
    left_out = ("distilled", "drop_path_mode")
    arguments = {renamed.get(k, k): v for k, v in ours.items() if k not in left_out}
    return kind(num_classes=CLASSES, **arguments, **options)


def normalise(images: "torch.Tensor") -> "torch.Tensor":
    """uint8 [B,3,H,W] to float32, as timm's prefetcher does it on the device."""
    images = images.float()
    mean, std = (
        images.new_tensor(values).view(1, 3, 1, 1) * 255 for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return images.sub_(mean).div_(std)


def train(
    work: Work, device: "torch.device", compiled: bool
) -> tuple["torch.nn.Module", Callable[[], None]]:
    """The student, and the reference's step that trains it, augmentation of a batch included."""
    import torch

    student = timm_model(work.model, drop_path_rate=work.drop_path_rate).to(device).train()
    if registry.is_distilled(work.model):
        student.set_distilled_training(True)
    from timm.data import Mixup
    from timm.data.random_erasing import RandomErasing
    from timm.utils import ModelEmaV2

    decayed = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": 0.05},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True if device.type == "cuda" else None)
    ema = ModelEmaV2(student, decay=0.99996) if work.ema else None
    erase = RandomErasing(0.25, mode="pixel", device=device.type)
    mix = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    teacher = timm_model(work.teacher).to(device).eval() if work.teacher else None
    forward = torch.compile(student) if compiled else student
    teach = torch.compile(teacher) if compiled and teacher else teacher
    images, labels = (torch.from_numpy(x) for x in work.examples().values())
    images, labels = images.permute(0, 3, 1, 2).contiguous().to(device), labels.long().to(device)
    autocast = _autocast(work, device)

    def step() -> None:
        inputs, targets = mix(erase(normalise(images)), labels)
        with autocast():
            heads = forward(inputs)
        heads = heads if isinstance(heads, tuple) else (heads,)
        loss = torch.sum(-targets * torch.log_softmax(heads[0].float(), -1), -1).mean()
        if teach is not None:
            with torch.no_grad(), autocast():
                decision = teach(inputs).argmax(-1)
            hard = torch.nn.functional.cross_entropy(heads[1].float(), decision)
            loss = 0.5 * loss + 0.5 * hard
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if ema is not None:
            ema.update(student)

    return student, step


def _forward(work: Work, device: "torch.device", compiled: bool) -> Callable[[], Any]:
    """From uint8 images, or a teacher's normalised ones, to logits."""
    import torch

    model = timm_model(work.model).to(device).eval()
    forward = torch.compile(model) if compiled else model
    images = torch.from_numpy(work.examples()["image"]).permute(0, 3, 1, 2).contiguous().to(device)
    normalised = normalise(images) if work.part == "teacher" else None
    autocast = _autocast(work, device)

    def step() -> "torch.Tensor":
        with torch.inference_mode(), autocast():
            return forward(normalise(images) if normalised is None else normalised)

    return step


def _autocast(
    work: Work, device: "torch.device"
) -> Callable[[], contextlib.AbstractContextManager]:
    import torch

    return functools.partial(
        torch.autocast, device.type, torch.bfloat16, enabled=work.dtype == "bfloat16"
    )


def opponents(
    work: Work, device: Literal["cpu", "cuda"], *, with_compile: bool
) -> Iterator[tuple[str, Opponent | InputError]]:
    """Starts PyTorch's programs by name; one that cannot be compiled is its error instead."""
    yield "torch_eager", Opponent(work, device, compiled=False)
    if with_compile:
        try:
            yield "torch_compile", Opponent(work, device, compiled=True)
        except InputError as error:
            yield "torch_compile", error
