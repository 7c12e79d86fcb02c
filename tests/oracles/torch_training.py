"""The reference's training step and learning rates, restated with torch and timm.

It shares no code with ours: a config is read as data, and every random draw is handed in.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from tests.oracles.torchvision_ops import import_torchvision

import_torchvision()

from timm.loss import SoftTargetCrossEntropy  # noqa: E402
from timm.optim import Lamb, param_groups_weight_decay  # noqa: E402
from timm.scheduler import CosineLRScheduler  # noqa: E402
from timm.utils import ModelEmaV2  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What the reference's models exclude from weight decay besides 1-D tensors; not dist_token.
UNDECAYED = ("pos_embed", "cls_token", "reg_token", "freqs", "rope.freqs")


class Draws(NamedTuple):
    """All randomness of a step but stochastic depth: NumPy arrays, boxes as (top, bottom, ...)."""

    erase_box: np.ndarray  # int [B,4], empty where the image is left alone
    erase_noise: np.ndarray  # [B,H,W,3]
    lam: np.ndarray  # [G], of mixup
    use_cutmix: np.ndarray  # bool [G]
    cutmix_box: np.ndarray  # int [G,4]


def normalise(images: np.ndarray) -> torch.Tensor:
    """Turns uint8 images [B,H,W,3] into normalised floats [B,3,H,W]."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255) - mean) / std


def augment(
    images: np.ndarray, labels: np.ndarray, draws: Draws, *, smoothing: float, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalises uint8 images [B,H,W,3], erases, and mixes every group with itself reversed.

    Returns images [B,3,H,W] and targets [B,K].
    """
    x = normalise(images)
    noise = torch.tensor(draws.erase_noise).permute(0, 3, 1, 2)
    for image, fill, (top, bottom, left, right) in zip(x, noise, draws.erase_box, strict=True):
        image[:, top:bottom, left:right] = fill[:, top:bottom, left:right]

    off = smoothing / num_classes
    targets = torch.full((len(x), num_classes), off)
    targets[torch.arange(len(x)), torch.from_numpy(labels).long()] = 1 - smoothing + off
    groups = zip(draws.lam.tolist(), draws.use_cutmix, draws.cutmix_box, strict=True)
    size = len(x) // len(draws.lam)
    for start, (lam, cutmix, (top, bottom, left, right)) in zip(
        range(0, len(x), size), groups, strict=True
    ):
        rows = slice(start, start + size)
        partner = x[rows].flip(0)
        if cutmix:
            x[rows, :, top:bottom, left:right] = partner[:, :, top:bottom, left:right]
            lam = 1 - (bottom - top) * (right - left) / float(x.shape[2] * x.shape[3])
        else:
            x[rows] = lam * x[rows] + (1 - lam) * partner
        targets[rows] = lam * targets[rows] + (1 - lam) * targets[rows].flip(0)
    return x, targets


def total_loss(
    heads: tuple[torch.Tensor, ...],
    targets: torch.Tensor,
    teacher: torch.Tensor | None,
    kind: str,
    alpha: float,
    temperature: float,
    reduction: str = "numel",
    base_loss: str = "cross_entropy",
) -> torch.Tensor:
    """The reference's DistillationLoss, a scalar; `heads` and `teacher` are logits [B,K].

    An only head has both parts, as in table 3 of the paper; the reference's code has two heads.
    """
    if base_loss == "bce":
        base = torch.nn.BCEWithLogitsLoss()(heads[0], targets.gt(0.0).type(targets.dtype))
    else:
        base = SoftTargetCrossEntropy()(heads[0], targets)
    if kind == "none":
        return base
    if kind == "hard":
        distill = F.cross_entropy(heads[-1], teacher.argmax(dim=1))
    else:
        divergence = torch.nn.KLDivLoss(reduction="sum", log_target=True)(
            F.log_softmax(heads[-1] / temperature, dim=1), F.log_softmax(teacher / temperature, 1)
        )
        count = heads[-1].numel() if reduction == "numel" else len(heads[-1])
        distill = divergence * temperature**2 / count
    return base * (1 - alpha) + distill * alpha


def decayed_names(model: torch.nn.Module, undecayed: Iterable[str] = UNDECAYED) -> set[str]:
    """The names of the parameters that decay; `undecayed` do not, nor do 1-D tensors and biases."""
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=tuple(undecayed))
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in decayed}


def make_optimizer(model: torch.nn.Module, settings: object) -> torch.optim.Optimizer:
    """AdamW, or timm's LAMB in place of apex's, which needs CUDA, over the reference's groups."""
    groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=UNDECAYED)
    adam = {"lr": settings.lr, "betas": (settings.b1, settings.b2), "eps": settings.eps}
    if settings.name == "lamb":
        return Lamb(groups, **adam, max_grad_norm=settings.clip_norm)
    return torch.optim.AdamW(groups, **adam)


def make_scheduler(optimizer: torch.optim.Optimizer, schedule: object) -> CosineLRScheduler:
    """The reference's schedule; it calls `step(epoch)` after the epoch, hence one epoch late."""
    return CosineLRScheduler(
        optimizer,
        t_initial=schedule.epochs,
        lr_min=schedule.min_lr,
        warmup_t=schedule.warmup_epochs,
        warmup_lr_init=schedule.warmup_lr,
        cycle_limit=1,
    )


def rates(peak: float, schedule: object) -> list[float]:
    """The learning rate of every epoch in the reference's loop."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = make_scheduler(optimizer, schedule)
    result = []
    for epoch in range(schedule.epochs):
        result.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    return result


class Training:
    """A model in the reference's training loop; `model` and `ema` (or None) hold its weights.

    `config` has our fields. The teacher, in evaluation mode, sees the student's batch.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: object,
        *,
        num_classes: int,
        steps_per_epoch: int,
        teacher: torch.nn.Module | None = None,
    ):
        self.model = model.train()
        two_heads = hasattr(model, "set_distilled_training")
        self.distilled = config.distill.kind != "none" and two_heads
        if self.distilled:
            model.set_distilled_training(True)  # otherwise timm trains the mean of the heads
        self.teacher = teacher
        self.config = config
        self.num_classes = num_classes
        self.steps_per_epoch = steps_per_epoch
        self.optimizer = make_optimizer(model, config.optimizer)
        self.scheduler = make_scheduler(self.optimizer, config.schedule)
        self.ema = ModelEmaV2(model, config.train.ema_decay) if config.train.ema_decay else None
        self.steps = 0

    def step(self, images: np.ndarray, labels: np.ndarray, draws: Draws) -> tuple[float, float]:
        """Trains on uint8 images [B,H,W,3] and labels [B]; returns the loss and the rate."""
        smoothing = self.config.mixing.smoothing
        x, targets = augment(
            images, labels, draws, smoothing=smoothing, num_classes=self.num_classes
        )
        heads = self.model(x) if self.distilled else (self.model(x),)
        teacher_logits = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_logits = self.teacher(x)
        distill = self.config.distill
        weights = distill.kind, distill.alpha, distill.temperature, distill.reduction
        loss = total_loss(heads, targets, teacher_logits, *weights, self.config.train.loss)
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model)
        self.steps += 1
        if self.steps % self.steps_per_epoch == 0:
            self.scheduler.step(self.steps // self.steps_per_epoch - 1)
        return loss.item(), rate
