"""PyTorch's side of the step benchmark: timm's model with the reference's step."""

import functools
import os
from collections.abc import Callable

import torch

from benchmarks.jax_step import CLASSES, Work
from benchmarks.turns import Program
from deit_jax.models import registry
from deit_jax.models.info import IMAGENET_MEAN, IMAGENET_STD
from tests.oracles import timm_models  # before timm: prepares torchvision

timm_model = functools.partial(timm_models.fresh, num_classes=CLASSES)


def build(work: Work, device_name: str, compiled: bool) -> Program:
    """Builds PyTorch's program of `work`.

    Args:
      work: what is timed.
      device_name: "cpu" or "cuda".
      compiled: by torch.compile; else eager.
    """
    torch.manual_seed(0)
    wait = peak_memory = lambda: None
    if device_name == "cuda":
        wait, peak_memory = torch.cuda.synchronize, torch.cuda.max_memory_allocated
        torch.backends.cudnn.benchmark = True
        # As XLA: float32 matmuls may use TF32.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    else:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    build_step = train if work.part == "train" else _forward
    _, step = build_step(work, torch.device(device_name), compiled)

    def run(count: int) -> None:
        for _ in range(count):
            step()
        wait()

    return Program(run, {}, peak_memory)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Turns uint8 [B,3,H,W] into normalised float32, as timm's prefetcher does on the device."""
    images = images.float()
    mean, std = (
        images.new_tensor(values).view(1, 3, 1, 1) * 255 for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return images.sub_(mean).div_(std)


def train(
    work: Work, device: torch.device, compiled: bool
) -> tuple[torch.nn.Module, Callable[[], None]]:
    """Builds the student, and the reference's step that trains it, augmentation included."""
    from timm.data import Mixup
    from timm.data.random_erasing import RandomErasing
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import param_groups_weight_decay
    from timm.utils import ModelEmaV2

    config = work.recipe()
    student = timm_model(work.model, drop_path_rate=config.model.drop_path_rate)
    student = student.to(device).train()
    if registry.is_distilled(work.model):
        student.set_distilled_training(bool(work.teacher))
    groups = param_groups_weight_decay(student, config.optimizer.weight_decay)
    fused = True if device.type == "cuda" else None
    optimizer = torch.optim.AdamW(groups, lr=config.optimizer.lr, fused=fused)
    ema = ModelEmaV2(student, decay=config.train.ema_decay) if work.ema else None
    erase = RandomErasing(config.mixing.random_erasing, mode="pixel", device=device.type)
    mix = Mixup(
        mixup_alpha=config.mixing.mixup_alpha,
        cutmix_alpha=config.mixing.cutmix_alpha,
        label_smoothing=config.mixing.smoothing,
        num_classes=CLASSES,
    )
    teacher = timm_model(work.teacher).to(device).eval() if work.teacher else None
    forward = torch.compile(student) if compiled else student
    teach = torch.compile(teacher) if compiled and teacher else teacher
    images, labels, autocast = _setting(work, device)

    def step() -> None:
        inputs, targets = mix(erase(normalise(images)), labels)
        with autocast():
            heads = forward(inputs)
        heads = heads if isinstance(heads, tuple) else (heads,)
        loss = SoftTargetCrossEntropy()(heads[0].float(), targets)
        if teach is not None:
            with torch.no_grad(), autocast():
                decision = teach(inputs).argmax(-1)
            hard = torch.nn.functional.cross_entropy(heads[-1].float(), decision)
            loss = 0.5 * loss + 0.5 * hard
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if ema is not None:
            ema.update(student)

    return student, step


def _forward(
    work: Work, device: torch.device, compiled: bool
) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """The model, and its forward pass from uint8 images, or a teacher's normalised ones."""
    model = timm_model(work.model).to(device).eval()
    forward = torch.compile(model) if compiled else model
    images, _, autocast = _setting(work, device)
    normalised = normalise(images) if work.part == "teacher" else None

    def step() -> torch.Tensor:
        with torch.inference_mode(), autocast():
            return forward(normalise(images) if normalised is None else normalised)

    return model, step


def _setting(work: Work, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Callable]:
    """Images and labels on the device, and what chooses the dtype of the matmuls."""
    images, labels = (torch.from_numpy(x) for x in work.examples().values())
    images = images.permute(0, 3, 1, 2).contiguous()
    enabled = work.dtype == "bfloat16"
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=enabled)
    return images.to(device), labels.long().to(device), autocast
