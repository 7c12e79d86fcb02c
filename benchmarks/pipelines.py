"""The input pipelines that the benchmark compares: ours, timm's and the reference's.

Each returns an endless iterator of batches from a config whose data set is a folder. TensorFlow and
PyTorch are imported inside: every pipeline has a process of its own, which needs only one of them.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from deit_jax.config.plan import plan_data


def ours(
    config: ConfigDict, *, train: bool, change: Callable[[Any], None] | None = None
) -> Iterator[Any]:
    """Our batches, uint8; for training in the order of a run on one device.

    `change` gets the source before it is used.
    """
    from deit_jax import data

    source = data.open_source(config.dataset, "train" if train else "eval")
    if change:
        change(source)
    plan = data.InputPlan.of(config, plan_data(config, source, num_devices=1))
    return data.train_batches(source, plan) if train else data.eval_batches(source, plan)


def timm(config: ConfigDict, cores: int, *, train: bool, in_uint8: bool) -> Iterator[Any]:
    """timm's transform in PyTorch's loader.

    Not `in_uint8`, the workers also normalise and erase, in float32, as the reference has it; else
    they leave that to the accelerator, as timm's own training does.
    """
    _prepare_torch(cores)
    from timm.data import auto_augment, create_transform
    from timm.data.loader import fast_collate

    auto_augment.NAME_TO_OP.update(dict.fromkeys(("Posterize", "PosterizeIncreasing"), _posterize))
    chosen = config.input
    augmentation = {
        "scale": chosen.scale,
        "ratio": chosen.ratio,
        "hflip": chosen.hflip,
        "color_jitter": chosen.color_jitter or None,
        "auto_augment": chosen.auto_augment or None,
        "re_prob": config.mixing.random_erasing,
        "re_mode": "pixel",
    }
    transform = create_transform(
        chosen.image_size,
        is_training=train,
        use_prefetcher=in_uint8,
        interpolation=chosen.interpolation,
        mean=chosen.mean,
        std=chosen.std,
        crop_pct=chosen.crop_ratio,
        **(augmentation if train else {}),
    )
    collate = fast_collate if in_uint8 else None
    return _torch_batches(config, cores, transform, train=train, collate=collate)


def reference(config: ConfigDict, cores: int, *, in_uint8: bool) -> Iterator[Any]:
    """The reference's training transform for DeiT III; not `in_uint8`, it normalises as well."""
    _prepare_torch(cores)
    chain = three_augment_chain(config.input, in_uint8=in_uint8)
    return _torch_batches(config, cores, chain, train=True)


def three_augment_chain(chosen: ConfigDict, *, in_uint8: bool) -> Callable[[Any], Any]:
    """Builds DeiT III's transform as the reference composes it, a PIL image to [3, S, S].

    Random-resized or simple random crop, flip, exactly one of grey, solarise and blur, colour
    jitter, and normalisation unless `in_uint8`. Nothing is erased.
    """
    from PIL import ImageFilter, ImageOps
    from timm.data.transforms import RandomResizedCropAndInterpolation
    from torchvision import transforms

    size, how = chosen.image_size, chosen.interpolation
    crop = [RandomResizedCropAndInterpolation(size, chosen.scale, chosen.ratio, how)]
    if chosen.train_crop == "simple_random":
        crop = [
            transforms.Resize(size, transforms.InterpolationMode(how)),
            transforms.RandomCrop(size, padding=chosen.pad, padding_mode="reflect"),
        ]

    def blur(image: Any) -> Any:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    grey = transforms.Grayscale(num_output_channels=3)
    end = [transforms.PILToTensor()]
    if not in_uint8:
        end = [transforms.ToTensor(), transforms.Normalize(chosen.mean, chosen.std)]
    return transforms.Compose(
        [
            *crop,
            transforms.RandomHorizontalFlip(chosen.hflip),
            transforms.RandomChoice([grey, ImageOps.solarize, blur]),
            transforms.ColorJitter(*[chosen.color_jitter] * 3),
            *end,
        ]
    )


def _torch_batches(
    config: ConfigDict,
    cores: int,
    transform: Callable[[Any], Any],
    *,
    train: bool,
    collate: Callable[[list], Any] | None = None,
) -> Iterator[Any]:
    """PyTorch's loader over the folder; on one core it works within its process."""
    from timm.data import create_dataset
    from timm.data.distributed_sampler import RepeatAugSampler
    from torch.utils.data import DataLoader

    split = config.dataset.train_split if train else config.dataset.eval_split
    dataset = create_dataset("", f"{config.dataset.root}/{split}", search_split=False)
    dataset.transform = transform
    views = {"num_replicas": 1, "rank": 0, "num_repeats": config.input.repeats}
    loader = DataLoader(
        dataset,
        batch_size=config.train.batch_size,
        sampler=RepeatAugSampler(dataset, **views) if train else None,
        num_workers=cores if cores > 1 else 0,
        persistent_workers=cores > 1,
        collate_fn=collate,
        drop_last=train,
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def _prepare_torch(cores: int) -> None:
    from tests.oracles.torchvision_ops import import_torchvision

    import_torchvision()
    import torch

    torch.set_num_threads(cores)
    torch.manual_seed(0)
    random.seed(0)


def _posterize(image: Any, bits: int, **_: Any) -> Any:
    """Does as timm does, but black for no bits at all, which newer Pillow refuses."""
    from PIL import Image, ImageOps

    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)
