"""Draws the batch that a training step sees, or all that RandAugment can do to a picture.

deit-jax show-batch --config=digits --out batch.png --step 100
deit-jax show-batch --config=folder --config.dataset.root=ROOT --out batch.png \\
    --config.train.batch_size=64 --config.mixing.group_size=16 --count 32
deit-jax show-batch --randaugment rand-m9-mstd0.5-inc1 --out sheet.png cat.jpg
deit-jax show-batch --config=digits --randaugment rand-m9-inc1 --out sheet.png

A batch is drawn after everything that happens to it on the host and on the device, with the random
numbers of that step, on as many devices as there are here. Under each image stand its classes with
their weights in the target (without label smoothing), the number of its mixing group, and how much
of its own image mixup or cutmix has left.

The sheet has a row for each of RandAugment's operations, at levels from 0 to 10, and where the
operation has a sign also from 0 to -10; a policy draws level and sign. Without IMAGE it shows the
first picture of the recipe's training split; without --config it takes size, mean and interpolation
from the default recipe.
"""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from ml_collections import ConfigDict

from deit_jax import storage
from deit_jax.cli.arguments import check_no_input, new_file, one_or_more
from deit_jax.config.fields import default_config
from deit_jax.config.plan import check_batch, plan_data
from deit_jax.config.randaugment_policy import OPERATIONS, Policy, parse_policy
from deit_jax.console import log
from deit_jax.drawing import draw
from deit_jax.errors import InputError

RECIPE = "optional"
LEVELS = (0.0, 2.5, 5.0, 7.5, 10.0)


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags."""
    add = parser.add_argument
    add("--out", required=True, type=new_file, metavar="PNG", help="file to write")
    add("--step", type=int, help="draw the batch of this step (default: 0, the first)")
    add("--count", type=one_or_more, help="draw so many rows, the first ones (default: 24)")
    add("--randaugment", metavar="POLICY", help="draw the sheet, with the policy's list (inc1)")
    add("image", nargs="?", metavar="IMAGE", help="picture of the sheet")


def run(arguments: Namespace, emit: Callable[[object], None]) -> None:
    """Draws."""
    _check(arguments)
    from deit_jax.training.complete import complete

    config, policy = complete(arguments.config or default_config()), arguments.randaugment
    if policy is None:
        tiles, captions, title = batch_of_step(config, arguments.step or 0, arguments.count or 24)
        title = f"{Path(arguments.config_file).stem} · {title}"
        columns = math.ceil(math.sqrt(1.5 * len(tiles)))
    else:
        image = _picture(config, arguments.image)
        tiles, captions = operations(image, parse_policy(policy), config.input)
        title = f"RandAugment {policy} · {arguments.image or 'first image'} · operation and level"
        columns = 2 * len(LEVELS) - 1
    sheet = draw(tiles, captions, title=title, columns=columns)
    with storage.uploaded(arguments.out) as file:
        sheet.save(file)
    log(f"{arguments.out}: {sheet.width}×{sheet.height} pixels")
    emit({"out": str(arguments.out), "width": sheet.width, "height": sheet.height})


def _check(arguments: Namespace) -> None:
    sheet = arguments.randaugment is not None
    if arguments.out.suffix.lower() != ".png":
        raise InputError(f"--out is {arguments.out}, expected a name that ends in .png")
    for name in ("step", "count"):
        if sheet and getattr(arguments, name) is not None:
            raise InputError(f"--{name} has no meaning with --randaugment; remove it")
    if arguments.image is not None and not sheet:
        raise InputError(f"unexpected argument {arguments.image!r} without --randaugment")
    if arguments.config is None and arguments.image is None:
        other = " or an IMAGE" if sheet else ""
        raise InputError(f"--config{other} is missing; name a recipe, such as --config=digits")
    check_no_input("--out", arguments.out, filter(None, [arguments.image]))


def batch_of_step(
    config: ConfigDict, step: int, count: int
) -> tuple[list[np.ndarray], list[str], str]:
    """Returns the first rows of the global batch that training draws for a step.

    Args:
      config: the recipe.
      step: how many batches precede this one.
      count: rows; all where the batch has fewer.

    Returns:
      Images uint8 [S,S,3], no longer normalised; their captions; and a title.

    Raises:
      InputError: no such step, or an example that cannot be read.
    """
    import jax

    from deit_jax import data
    from deit_jax.training import showcase

    source = data.open_source(config.dataset, "train")
    check_batch(config, num_devices=jax.device_count(), num_processes=1)
    plan = plan_data(config, source, num_devices=jax.device_count())
    if not 0 <= step < plan.total_steps:
        raise InputError(
            f"--step is {step}, but training has the steps 0 to {plan.total_steps - 1}"
        )
    batch = next(data.train_batches(source, data.InputPlan.of(config, plan), start_step=step))
    tiles, captions = showcase.augmented(config, plan, batch, step, count)
    title = (
        f"step {step} · seed {config.train.seed} · {len(captions)} of {config.train.batch_size} "
        f"images · {config.input.image_size} pixels · groups of {plan.group_size} · "
        f"{config.input.auto_augment or 'no auto_augment'} · erasing "
        f"{config.mixing.random_erasing:g} · mixup {config.mixing.mixup_alpha:g} · cutmix "
        f"{config.mixing.cutmix_alpha:g} · smoothing {config.mixing.smoothing:g}"
    )
    return tiles, captions, title


def _picture(config: ConfigDict, image: str | None) -> np.ndarray:
    """A file, or the first training image, as uint8 [S,S,3], prepared as for evaluation."""
    from deit_jax.inference.preprocess import preprocess

    if image is None:
        from deit_jax import data
        from deit_jax.data.decode import decode

        image = decode(data.open_source(config.dataset, "train").fetch(0)[0]).numpy()
    info = SimpleNamespace(
        side=config.input.image_size,
        crop_ratio=None if config.input.train_crop == "small" else config.input.crop_ratio,
        interpolation=config.input.interpolation,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    return np.rint(255 * preprocess(info, image)[0]).astype(np.uint8)


def operations(
    image: np.ndarray, policy: Policy, input_config: ConfigDict
) -> tuple[list[np.ndarray | None], list[str]]:
    """Applies each operation to uint8 [S,S,3] at all LEVELS, and at these with the other sign.

    Args:
      image: the picture.
      policy: only `increasing` matters, which chooses between timm's two lists.
      input_config: group of the recipe; `mean` is the colour of what comes in from outside.

    Returns:
      The results and their captions, an operation a row, from level -10 over 0 to 10. An operation
      without a sign has None in place of its left half, one without a level only one result.
    """
    from deit_jax.data import randaugment, transforms

    how = {"policy": policy, "interpolation": input_config.interpolation}
    how["fill"] = transforms.fill_colour(input_config)

    def apply(operation: int, level: float, negative: bool) -> np.ndarray:
        draws = randaugment.Draws(
            np.int32([operation]), np.array([True]), np.float64([level]), np.array([negative])
        )
        return np.asarray(randaugment.apply(image, draws, **how))

    cells, captions = [], []
    for number, name in enumerate(OPERATIONS):
        left = [apply(number, level, True) for level in LEVELS[:0:-1]]
        right = [apply(number, level, False) for level in LEVELS]
        # The results say what has a sign or a level: there is no second list to go stale.
        if np.array_equal(left[0], right[-1]):
            left = [None] * len(left)
        if np.array_equal(right[0], right[-1]):
            right = [right[0]] + [None] * (len(right) - 1)
        cells += left + right
        levels = [*(-level for level in LEVELS[:0:-1]), *LEVELS]
        captions += [name if right[-1] is None else f"{name} {level:g}" for level in levels]
    return cells, captions
