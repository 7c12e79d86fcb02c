"""The train step: augmentation, gradient, update, and a guard that skips what is not finite."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from deit_jax.models.layouts import row_major
from deit_jax.models.network import Network, Tree, Variables
from deit_jax.parallel import axis
from deit_jax.training import accumulate, mixing, optim
from deit_jax.training.state import TrainState, step_keys
from deit_jax.training.tasks import choose_task
from deit_jax.training.teacher import teacher_forward

if TYPE_CHECKING:  # the step runs without ml_collections, which GPU hosts may lack
    from ml_collections import ConfigDict

    from deit_jax.config.plan import RunPlan


def make_train_step(
    config: "ConfigDict",
    plan: "RunPlan",
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    teacher: Network | None = None,
    replicated: NamedSharding | None = None,
) -> Callable[[TrainState, Variables | None, dict], tuple[TrainState, dict]]:
    """Builds the pure training step of a recipe.

    Args:
      config: a validated config.
      plan: its derived numbers.
      network: the student.
      optimizer: without learning rate (`optim.make_optimizer`).
      teacher: the teacher's computation where the recipe distils.
      replicated: sharding of small draws on the mesh; keeps mixing free of communication.

    Returns:
      step(state, teacher_variables, batch) → (state, metrics), to be jitted with the state
      donated. `batch` holds uint8 images [B,H,W,3] and int32 labels [B]; under pmap (see
      `parallel.axis`) a device's own rows. Metrics are float32 scalars: means over the global batch
      (`loss` and what `tasks` lists), `learning_rate`, `grad_norm`, and the state's two skip
      counters. A step whose loss or gradient is not finite changes only the counters and `step`.
    """
    augment = make_augment(config, plan, replicated=replicated)
    batch_loss = make_loss(config, network, teacher)

    def train_step(
        state: TrainState, teacher_variables: Variables | None, batch: dict
    ) -> tuple[TrainState, dict]:
        augment_key, noise_key = step_keys(config.train.seed, state.step)
        images, targets, _ = augment(augment_key, batch)
        grads, batch_stats, metrics = accumulate.gradient(
            functools.partial(batch_loss, teacher_variables),
            state.model,
            images,
            targets,
            noise_key,
            steps=config.train.accumulate_steps,
            replicated=replicated,
        )
        grads, metrics = axis.mean((grads, metrics))
        rate = optim.learning_rate(
            state.step,
            config.schedule,
            peak_lr=config.optimizer.lr,
            warmup_epochs=plan.warmup_epochs,
            steps_per_epoch=plan.steps_per_epoch,
        )
        metrics |= {"learning_rate": rate, "grad_norm": optax.tree.norm(grads)}
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        ema_decay = config.train.ema_decay
        state = update(state, grads, batch_stats, rate, finite, optimizer, ema_decay)
        metrics |= {name: getattr(state, name) for name in ("nonfinite_steps", "nonfinite_total")}
        return state, metrics

    return train_step


def make_augment(
    config: "ConfigDict", plan: "RunPlan", *, replicated: NamedSharding | None = None
) -> Callable[[jax.Array, dict], tuple[jax.Array, jax.Array, mixing.MixDraw]]:
    """Builds a recipe's augmentation on the device; arguments as `make_train_step`.

    Returns:
      augment(key, batch) → (images, targets, draw): what the network sees, float [B,H,W,3], what
      the loss wants, [B,K], and how the groups were mixed. `batch` as in `make_train_step`.
    """

    names = ("smoothing", "mixup_alpha", "cutmix_alpha", "prob", "switch_prob")

    @jax.named_scope("augment")
    def augment(key: jax.Array, batch: dict) -> tuple[jax.Array, jax.Array, mixing.MixDraw]:
        erase_key, mix_key = jax.random.split(key)
        images = mixing.normalize(batch["image"], config.input.mean, config.input.std)
        images = mixing.random_erasing(erase_key, images, prob=config.mixing.random_erasing)
        images, targets, draw = mixing.mix(
            mix_key,
            images,
            batch["label"],
            num_classes=plan.num_classes,
            group_size=plan.group_size,
            replicated=replicated,
            **{name: config.mixing[name] for name in names},
        )
        # Planes of pixels, as the TPU gets them. Its compiler would put the batch last for the sake
        # of the patches, in everything up to here: 2.1 ms for 1.4, of 64 images on a v5e.
        planes = row_major(jnp.moveaxis(images, -1, 1), "tpu")
        return jnp.moveaxis(planes, 1, -1), targets, draw

    return augment


def make_loss(config: "ConfigDict", network: Network, teacher: Network | None) -> Callable:
    """Builds the loss of a batch, or of a micro-batch; arguments as `make_train_step`.

    Returns:
      loss(teacher_variables, params, batch_stats, images, targets, key) → (mean loss,
      (batch_stats, metrics)), of augmented images and their targets.
    """
    task = choose_task(config)

    def loss(
        teacher_variables: Variables | None,
        params: Tree,
        batch_stats: Tree,
        images: jax.Array,
        targets: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, tuple[Tree, dict]]:
        teacher_logits = None
        if teacher is not None:
            teacher_logits = teacher_forward(teacher, teacher_variables, images, network.info)
        if config.train.cosub:  # each image next to itself, so that both stay on their device
            images = jnp.repeat(images, 2, axis=0)
        with jax.named_scope("student"):
            params = optim.freeze(params, config.optimizer.trainable)
            heads, batch_stats = network(Variables(params, batch_stats), images, key)
        with jax.named_scope("loss"):
            per_image, parts = task(heads, targets, teacher_logits, config)
            means = {name: x.mean() for name, x in (parts | {"loss": per_image}).items()}
        return means["loss"], (batch_stats, means)

    return loss


def update(
    state: TrainState,
    grads: Tree,
    batch_stats: Tree,
    rate: jax.Array,
    finite: jax.Array,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
) -> TrainState:
    """Returns the state after an update by gradients like its parameters, at a learning rate.

    `batch_stats` are the BatchNorm statistics after the batch. Where the step is not `finite`, only
    `step` and the skip counters change.
    """
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model.params)
        params = optim.apply_updates(state.model.params, updates, rate)
    model = guard(finite, Variables(params, batch_stats), state.model)
    ema = None
    if state.ema is not None:
        # Of the guarded model, which is written anyway: of the new one, the TPU compiler writes the
        # new parameters too, and selects in a second pass.
        with jax.named_scope("ema"):
            ema = optim.ema_update(state.ema, model, ema_decay)
        ema = guard(finite, ema, state.ema)
    skipped = jnp.where(finite, 0, 1)
    return TrainState(
        step=state.step + 1,
        model=model,
        opt_state=guard(finite, opt_state, state.opt_state),
        ema=ema,
        nonfinite_steps=(state.nonfinite_steps + 1) * skipped,
        nonfinite_total=state.nonfinite_total + skipped,
    )


@jax.named_scope("guard")
def guard(finite: jax.Array, new: Tree, old: Tree) -> Tree:
    """Returns `new` if `finite`, else `old`."""
    return jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)
