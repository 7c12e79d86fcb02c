"""The input pipelines that `tools/benchmark.py input` measures: ours, timm's and the reference's.

Every one is a function from a Setup to an endless iterator of batches. TensorFlow and PyTorch are
imported inside: each pipeline has a process of its own, and that process needs only one of them.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ml_collections import ConfigDict

from deit_jax.config.plan import plan_run

if TYPE_CHECKING:
    import torch
    from PIL import Image


class Setup(NamedTuple):
    """What a pipeline is built from."""

    config: ConfigDict  # a folder as data set, and the batch size
    cores: int  # that its process and its workers may use


def ours_train(setup: Setup) -> Iterator[Any]:
    """Our training batches, uint8, drawn in the order of a run on one device."""
    from deit_jax import data

    return data.train_batches(*_source_and_plan(setup, "train"))


def ours_eval(setup: Setup) -> Iterator[Any]:
    """Our evaluation batches, uint8."""
    from deit_jax import data

    return data.eval_batches(*_source_and_plan(setup, "eval"))


def _source_and_plan(setup: Setup, split: str) -> tuple[Any, Any]:
    from deit_jax import data

    source = data.open_source(setup.config.dataset, split)
    plan = plan_run(
        setup.config,
        num_train=source.num_examples,
        num_eval=0,
        num_classes=source.num_classes,
        class_names=source.class_names,
        num_devices=1,
    )
    return source, data.InputPlan.of(setup.config, plan)


def decode_and_crop(setup: Setup) -> Iterator[Any]:
    """Only reads files and decodes the random boxes of a training crop, one box a file."""
    import tensorflow as tf

    from deit_jax import data
    from deit_jax.data.crop import random_jpeg_cut

    config = setup.config
    source = data.open_source(config.dataset, "train")

    def load(number: tf.Tensor) -> tf.Tensor:
        file, _ = source.fetch(number % source.num_examples)
        seed = tf.stack([tf.constant(config.train.seed, tf.int64), number])
        box = random_jpeg_cut(file, seed, scale=config.input.scale, ratio=config.input.ratio)
        return tf.shape(box)

    dataset = tf.data.Dataset.range(tf.int64.max)
    dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return dataset.batch(config.train.batch_size).prefetch(2).as_numpy_iterator()


def timm_train(setup: Setup) -> Iterator[Any]:
    """timm's loader as the reference uses it: the workers also normalise and erase, in float32."""
    return _endless(_timm_loader(setup, train=True, in_uint8=False))


def timm_train_uint8(setup: Setup) -> Iterator[Any]:
    """timm's loader as its own training uses it, which leaves the rest to the accelerator."""
    return _endless(_timm_loader(setup, train=True, in_uint8=True))


def timm_eval(setup: Setup) -> Iterator[Any]:
    """timm's evaluation loader; the workers also normalise."""
    return _endless(_timm_loader(setup, train=False, in_uint8=False))


def timm_eval_uint8(setup: Setup) -> Iterator[Any]:
    """timm's evaluation loader, which leaves normalising to the accelerator."""
    return _endless(_timm_loader(setup, train=False, in_uint8=True))


def reference_train(setup: Setup) -> Iterator[Any]:
    """The reference's chain for DeiT III in PyTorch's loader; the workers also normalise."""
    return _endless(_reference_loader(setup, in_uint8=False))


def reference_train_uint8(setup: Setup) -> Iterator[Any]:
    """The same without normalising."""
    return _endless(_reference_loader(setup, in_uint8=True))


def _endless(loader: "torch.utils.data.DataLoader") -> Iterator[Any]:
    return itertools.chain.from_iterable(itertools.repeat(loader))


def _timm_loader(setup: Setup, *, train: bool, in_uint8: bool) -> "torch.utils.data.DataLoader":
    _prepare_torch(setup)
    import torch
    from timm.data import auto_augment, create_loader

    auto_augment.NAME_TO_OP.update(dict.fromkeys(("Posterize", "PosterizeIncreasing"), _posterize))
    config, options = setup.config.input, {}
    if train:
        options = {
            "is_training": True,
            "scale": config.scale,
            "ratio": config.ratio,
            "hflip": config.hflip,
            "color_jitter": config.color_jitter or None,
            "auto_augment": config.auto_augment or None,
            "re_prob": setup.config.mixing.random_erasing,
            "re_mode": "pixel",
        }
    loader = create_loader(
        _dataset(setup, train=train),
        input_size=(3, config.image_size, config.image_size),
        batch_size=setup.config.train.batch_size,
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_ratio,
        num_workers=_workers(setup),
        use_prefetcher=in_uint8,
        device=torch.device("cpu"),
        **options,
    )
    if in_uint8:
        loader = loader.loader  # the prefetcher around it normalises on the accelerator
    return _repeated(loader, setup) if train and config.repeats > 1 else loader


def _repeated(loader: "torch.utils.data.DataLoader", setup: Setup) -> "torch.utils.data.DataLoader":
    """The same loader with timm's sampler of repeats, which it has for several processes only."""
    import torch
    from timm.data.distributed_sampler import RepeatAugSampler

    sampler = RepeatAugSampler(
        loader.dataset, num_replicas=1, rank=0, num_repeats=setup.config.input.repeats
    )
    return torch.utils.data.DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        persistent_workers=loader.persistent_workers,
        drop_last=True,
    )


def _reference_loader(setup: Setup, *, in_uint8: bool) -> "torch.utils.data.DataLoader":
    _prepare_torch(setup)
    import torch

    dataset = _dataset(setup, train=True)
    dataset.transform = three_augment_chain(setup.config.input, in_uint8=in_uint8)
    workers = _workers(setup)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=setup.config.train.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        drop_last=True,
    )
    return _repeated(loader, setup) if setup.config.input.repeats > 1 else loader


def three_augment_chain(
    input_config: ConfigDict, *, in_uint8: bool
) -> "Callable[[Image.Image], torch.Tensor]":
    """DeiT III's training transform as the reference composes it, a PIL image to [3, S, S].

    Random-resized or simple random crop, flip, exactly one of grey, solarise and blur, colour
    jitter, and normalisation unless `in_uint8`. Nothing is erased.
    """
    from PIL import ImageFilter, ImageOps
    from timm.data.transforms import RandomResizedCropAndInterpolation
    from torchvision import transforms

    size = input_config.image_size
    if input_config.train_crop == "simple_random":
        how = transforms.InterpolationMode(input_config.interpolation)
        crop = [
            transforms.Resize(size, how),
            transforms.RandomCrop(size, padding=input_config.pad, padding_mode="reflect"),
        ]
    else:
        crop = [
            RandomResizedCropAndInterpolation(
                size,
                scale=input_config.scale,
                ratio=input_config.ratio,
                interpolation=input_config.interpolation,
            )
        ]

    def blur(image: "Image.Image") -> "Image.Image":
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    grey = transforms.Grayscale(num_output_channels=3)
    end = [transforms.PILToTensor()]
    if not in_uint8:
        end = [transforms.ToTensor(), transforms.Normalize(input_config.mean, input_config.std)]
    return transforms.Compose(
        [
            *crop,
            transforms.RandomHorizontalFlip(input_config.hflip),
            transforms.RandomChoice([grey, ImageOps.solarize, blur]),
            transforms.ColorJitter(*[input_config.color_jitter] * 3),
            *end,
        ]
    )


def _dataset(setup: Setup, *, train: bool) -> Any:
    from timm.data import create_dataset

    config = setup.config.dataset
    split = config.train_split if train else config.eval_split
    return create_dataset("", f"{config.root}/{split}", search_split=False)


def _workers(setup: Setup) -> int:
    return setup.cores if setup.cores > 1 else 0


def _prepare_torch(setup: Setup) -> None:
    from tests.oracles.torchvision_ops import import_torchvision

    import_torchvision()
    import torch

    torch.set_num_threads(setup.cores)
    torch.manual_seed(0)
    random.seed(0)


def _posterize(image: "Image.Image", bits: int, **_: Any) -> "Image.Image":
    """timm's, but black for no bits at all, as Pillow had it until it began to refuse them."""
    from PIL import Image, ImageOps

    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)
