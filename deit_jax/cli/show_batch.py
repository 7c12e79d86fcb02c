"""Draws the batch that a training step sees, or all that RandAugment can do to a picture.

deit-jax show-batch --config=digits --out batch.png --step 100
deit-jax show-batch --config=folder --config.dataset.root=ROOT --out batch.png \\
    --config.train.batch_size=64 --config.mixing.group_size=16 --count 32
deit-jax show-batch --randaugment rand-m9-mstd0.5-inc1 --out sheet.png cat.jpg
deit-jax show-batch --config=digits --randaugment rand-m9-inc1 --out sheet.png

A batch is drawn after everything that happens to it on the host and on the device, with the random
numbers of that step, on as many devices as there are here. Under each image stand its classes with
their weights in the target (label smoothing taken out), the number of its mixing group, and how
much of its own image mixup or cutmix has left.

The sheet has a row for each of RandAugment's operations, at levels from 0 to 10, where there is a
sign also from 0 to -10; level and sign are what a policy draws. Without IMAGE it shows the first
picture of the recipe's training split, without --config it takes size, mean and interpolation from
the default recipe.
"""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from deit_jax.cli.arguments import new_file, one_or_more
from deit_jax.config.fields import default_config
from deit_jax.config.plan import RunPlan, check_batch, plan_run
from deit_jax.config.randaugment_policy import OPERATIONS, Policy, parse_policy
from deit_jax.console import log
from deit_jax.errors import InputError
from deit_jax.inference.preprocess import preprocess

RECIPE = "optional"
LEVELS = (0.0, 2.5, 5.0, 7.5, 10.0)
MARGIN = 8  # pixels around and between the tiles
MIN_SIDE = 160  # smaller images are enlarged by whole factors
FONTS = ("DejaVuSans.ttf", "Arial.ttf")  # Pillow's own font has no accents
BACKGROUND, INK = (255, 255, 255), (20, 20, 20)


class Batch(NamedTuple):
    """The first N rows of a step's batch, as the network and the loss get them."""

    pixels: np.ndarray  # uint8 [N,S,S,3], the normalisation undone
    labels: np.ndarray  # int [N], of the image itself
    weights: np.ndarray  # [N,K], of the classes, without label smoothing
    groups: np.ndarray  # int [N], number of the mixing group
    lam: np.ndarray  # [N], share of the image itself
    cutmix: np.ndarray  # bool [N]


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags."""
    add = parser.add_argument
    add("--out", required=True, type=new_file, metavar="PNG", help="file to write")
    add("--step", type=int, help="batch of the step after so many others (default: 0)")
    add("--count", type=one_or_more, help="rows of the batch to draw, the first ones (default: 24)")
    add("--randaugment", metavar="POLICY", help="draw the sheet, with the policy's list (inc1)")
    add("image", nargs="?", metavar="IMAGE", help="picture of the sheet")


def run(arguments: Namespace, emit: Callable[[object], None]) -> None:
    """Draws."""
    _check(arguments)
    from deit_jax.training.complete import complete

    config = complete(arguments.config or default_config())
    if arguments.randaugment is None:
        from deit_jax import data
        from deit_jax.models import imagenet

        source = data.open_source(config.dataset, "train")
        plan = _plan(config, source)
        step, count = arguments.step or 0, arguments.count or 24
        batch = batch_of_step(config, plan, source, step=step, count=count)
        names = plan.class_names or [f"class {i}" for i in range(plan.num_classes)]
        names = [imagenet.readable(name) for name in names]
        tiles = list(batch.pixels)
        sheet = draw(
            tiles,
            [_caption(batch, row, names) for row in range(len(tiles))],
            title=_title(config, plan, Path(arguments.config_file).stem, step, len(tiles)),
            columns=math.ceil(math.sqrt(1.5 * len(tiles))),
        )
    else:
        policy = parse_policy(arguments.randaugment)
        picture, name = _picture(config, arguments.image)
        cells = contact_sheet(picture, policy, config.input)
        sheet = draw(
            [cell for _, cell in cells],
            [[[caption]] for caption, _ in cells],
            title=[f"RandAugment {arguments.randaugment}", name, "operation and level"],
            columns=2 * len(LEVELS) - 1,
        )
    sheet.save(arguments.out)
    log(f"{arguments.out}: {sheet.width}×{sheet.height} pixels")
    emit({"out": str(arguments.out), "width": sheet.width, "height": sheet.height})


def _check(arguments: Namespace) -> None:
    if arguments.out.suffix.lower() != ".png":
        raise InputError(f"--out is {arguments.out}, expected a name that ends in .png")
    sheet = arguments.randaugment is not None
    for name in ("step", "count"):
        if sheet and getattr(arguments, name) is not None:
            raise InputError(f"--{name} has no meaning with --randaugment; remove it")
    if arguments.image is not None and not sheet:
        raise InputError(f"unexpected argument {arguments.image!r} without --randaugment")
    if arguments.config is None and arguments.image is None:
        other = " or an IMAGE" if sheet else ""
        raise InputError(f"--config{other} is missing; name a recipe, such as --config=digits")


def _plan(config: ConfigDict, source: object) -> RunPlan:
    import jax

    devices = jax.device_count()
    check_batch(config, num_devices=devices, num_processes=1)
    return plan_run(
        config,
        num_train=source.num_examples,
        num_eval=0,
        num_classes=source.num_classes,
        class_names=source.class_names,
        num_devices=devices,
    )


def batch_of_step(
    config: ConfigDict, plan: RunPlan, source: object, *, step: int, count: int
) -> Batch:
    """The first `count` rows of the global batch that training draws for `step`.

    Args:
      config: the recipe.
      plan: its derived numbers.
      source: its training split.
      step: how many batches precede this one.
      count: all rows where the batch has fewer.

    Raises:
      InputError: no such step, or an example that cannot be read.
    """
    import jax

    from deit_jax import data
    from deit_jax.training.state import step_keys
    from deit_jax.training.step import make_augment

    if not 0 <= step < plan.total_steps:
        raise InputError(
            f"--step is {step}, but training has the steps 0 to {plan.total_steps - 1}"
        )
    batch = next(data.train_batches(source, data.InputPlan.of(config, plan), start_step=step))
    augment = make_augment(config, plan)

    @jax.jit
    def see(batch: dict) -> tuple[jax.Array, jax.Array, object]:
        key, _ = step_keys(config.train.seed, step)
        images, targets, draw = augment(key, batch)
        return images[:count], targets[:count], draw

    images, targets, draw = jax.device_get(see(batch))
    values = 255 * (images * np.float64(config.input.std) + np.float64(config.input.mean))
    smoothing = config.mixing.smoothing
    groups = np.arange(len(images)) // plan.group_size
    with np.errstate(invalid="ignore"):  # smoothing 1 leaves no class anything of its own
        weights = (targets - smoothing / plan.num_classes) / np.float64(1 - smoothing)
    return Batch(
        pixels=np.rint(values).clip(0, 255).astype(np.uint8),  # erasing's noise goes beyond
        labels=batch["label"][: len(images)],
        weights=weights,
        groups=groups,
        lam=draw.lam[groups],
        cutmix=draw.use_cutmix[groups],
    )


def _caption(batch: Batch, row: int, names: list[str]) -> list[list[str]]:
    # Rounded twice: float32's error must not tip 0.625 and 0.375 to a sum of 1.01.
    weights, own = batch.weights[row].round(6), batch.labels[row]
    others = [k for k in np.flatnonzero(weights > 0.005) if k != own]
    classes = [f"{names[k]} {weights[k]:.2f}" for k in (own, *others)]
    if batch.cutmix[row]:
        mixed = f"cutmix {batch.lam[row]:.2f}"
    elif batch.lam[row] < 1:
        mixed = f"mixup {batch.lam[row]:.2f}"
    else:
        mixed = "not mixed"
    return [classes, [f"group {batch.groups[row]}", mixed]]


def _title(config: ConfigDict, plan: RunPlan, recipe: str, step: int, count: int) -> list[str]:
    mixing = config.mixing
    return [
        recipe,
        f"step {step}",
        f"seed {config.train.seed}",
        f"{count} of {config.train.batch_size} images",
        f"{config.input.image_size} pixels",
        f"groups of {plan.group_size}",
        config.input.auto_augment or "no auto_augment",
        f"erasing {mixing.random_erasing:g}",
        f"mixup {mixing.mixup_alpha:g}",
        f"cutmix {mixing.cutmix_alpha:g}",
        f"smoothing {mixing.smoothing:g}",
    ]


def _picture(config: ConfigDict, file: str | None) -> tuple[np.ndarray, str]:
    """A picture uint8 [S,S,3], prepared as for evaluation, and its name."""
    size = config.input.image_size
    if file is not None:
        uncropped = config.input.train_crop == "small"
        info = SimpleNamespace(
            image_size=size,
            crop_ratio=None if uncropped else config.input.crop_ratio,
            interpolation=config.input.interpolation,
            mean=(0, 0, 0),
            std=(1, 1, 1),
        )
        return np.rint(255 * preprocess(info, file)[0]).astype(np.uint8), Path(file).name
    from deit_jax import data

    source = data.open_source(config.dataset, "train")
    plan = data.InputPlan(
        input=config.input, image_size=size, batch_size=1, steps_per_epoch=1, seed=0, group_size=1
    )
    image = next(data.eval_batches(source, plan))["image"][0]
    return image, Path(source.example_id(0)).name


def contact_sheet(
    image: np.ndarray, policy: Policy, input_config: ConfigDict
) -> list[tuple[str, np.ndarray | None]]:
    """Applies each operation to uint8 [S,S,3] at all LEVELS, and at these with the other sign.

    Args:
      image: the picture.
      policy: only `increasing` matters, which chooses between timm's two lists.
      input_config: group of the recipe; `mean` is the colour of what comes in from outside.

    Returns:
      (caption, cell) row by row, an operation a row, from level -10 over 0 to 10. An operation
      without sign has None in place of its left half, one without level only one cell.
    """
    from deit_jax.data import randaugment, transforms

    def apply(operation: int, level: float, negative: bool) -> np.ndarray:
        draws = randaugment.Draws(
            np.int32([operation]), np.array([True]), np.float64([level]), np.array([negative])
        )
        how = {
            "interpolation": input_config.interpolation,
            "fill": transforms.fill_colour(input_config),
        }
        return np.asarray(randaugment.apply(image, draws, policy=policy, **how))

    cells = []
    for number, name in enumerate(OPERATIONS):
        left = [apply(number, level, True) for level in LEVELS[:0:-1]]
        right = [apply(number, level, False) for level in LEVELS]
        # The results say what has a sign or a level: there is no second list to go stale.
        if np.array_equal(left[0], right[-1]):
            left = [None] * len(left)
        if np.array_equal(right[0], right[-1]):
            right = [right[0]] + [None] * (len(right) - 1)
        levels = [f"{level:g}" for level in (*(-x for x in LEVELS[:0:-1]), *LEVELS)]
        for level, cell in zip(levels, left + right, strict=True):
            cells.append((name if right[-1] is None else f"{name} {level}", cell))
    return cells


def draw(
    tiles: list[np.ndarray | None],
    captions: list[list[list[str]]],
    *,
    title: list[str],
    columns: int,
) -> Image.Image:
    """Sets square uint8 images of one size in a grid, row by row, each over its caption.

    Args:
      tiles: [S,S,3] each; None leaves a gap.
      captions: the lines of each caption, in pieces between which too long a line is broken.
      title: the pieces of the title.
      columns: tiles in a row.
    """
    side = next(len(tile) for tile in tiles if tile is not None)
    side *= -(-MIN_SIDE // side)
    small, large = _font(14), _font(18)
    width = MARGIN + columns * (side + MARGIN)
    heading = _wrap(title, large, width - 2 * MARGIN)
    lines = [[part for line in c for part in _wrap(line, small, side)] for c in captions]
    top = 2 * MARGIN + 24 * len(heading)
    step = side + 18 * max(map(len, lines)) + 2 * MARGIN
    sheet = Image.new("RGB", (width, top + -(-len(tiles) // columns) * step), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(heading):
        pen.text((MARGIN, MARGIN + 24 * number), line, font=large, fill=INK)
    for place, (tile, caption) in enumerate(zip(tiles, lines, strict=True)):
        if tile is None:
            continue
        x, y = MARGIN + place % columns * (side + MARGIN), top + place // columns * step
        image = Image.fromarray(tile)
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        for number, line in enumerate(caption):
            pen.text((x, y + side + 3 + 18 * number), line, font=small, fill=INK)
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _wrap(pieces: list[str], font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Joins the pieces into lines of at most `width` pixels; a piece too wide is cut short."""
    lines = []
    for piece in pieces:
        while font.getlength(piece) > width:
            piece = piece.removesuffix("…")[:-1] + "…"
        if lines and font.getlength(joined := f"{lines[-1]} · {piece}") <= width:
            lines[-1] = joined
        else:
            lines.append(piece)
    return lines
