"""The training state, and the pure train and eval steps that the loop compiles."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from deit_jax.models.network import Network, Tree, Variables
from deit_jax.parallel import axis
from deit_jax.training import losses, mixing, optim
from deit_jax.training.accumulate import accumulate
from deit_jax.training.state import TrainState, step_keys
from deit_jax.training.teacher import teacher_forward

if TYPE_CHECKING:  # the step itself runs without ml_collections, which GPU hosts may lack
    from ml_collections import ConfigDict

    from deit_jax.config.plan import RunPlan


def make_augment(
    config: "ConfigDict",
    plan: "RunPlan",
    *,
    replicated: NamedSharding | None = None,
) -> Callable[[jax.Array, dict], tuple[jax.Array, jax.Array, mixing.MixDraw]]:
    """Builds a recipe's augmentation on the device; arguments as `make_train_step`.

    Returns:
      augment(key, batch) → (images, targets, draw): what the network sees, float [B,H,W,3], what
      the loss wants, [B,K], and how the groups were mixed. `batch` as in `make_train_step`.
    """

    def augment(key: jax.Array, batch: dict) -> tuple[jax.Array, jax.Array, mixing.MixDraw]:
        erase_key, mix_key = jax.random.split(key)
        images = mixing.normalize(batch["image"], config.input.mean, config.input.std)
        if config.mixing.random_erasing:
            images = mixing.random_erasing(erase_key, images, prob=config.mixing.random_erasing)
        return mixing.mix(
            mix_key,
            images,
            batch["label"],
            num_classes=plan.num_classes,
            group_size=plan.group_size,
            smoothing=config.mixing.smoothing,
            mixup_alpha=config.mixing.mixup_alpha,
            cutmix_alpha=config.mixing.cutmix_alpha,
            prob=config.mixing.prob,
            switch_prob=config.mixing.switch_prob,
            replicated=replicated,
        )

    return augment


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
      donated. `batch` holds uint8 images [B,H,W,3] and int32 labels [B]. Metrics are float32
      scalars: means over the global batch (`loss`, its parts `base` and `distill` or `cosub`,
      `teacher_agreement`), `learning_rate`, `grad_norm`, and the state's two skip counters.
      A step whose loss or gradient is not finite changes only the counters and `step`.
    """
    distil = config.distill
    augment = make_augment(config, plan, replicated=replicated)

    def train_step(
        state: TrainState, teacher_variables: Variables | None, batch: dict
    ) -> tuple[TrainState, dict]:
        trainable = optim.trainable_mask(state.model.params, config.optimizer.trainable)
        augment_key, noise_key = step_keys(config.train.seed, state.step)
        images, targets, _ = augment(augment_key, batch)

        def gradient(
            params: Tree, batch_stats: Tree, images: jax.Array, targets: jax.Array, key: jax.Array
        ) -> tuple[Tree, Tree, dict]:
            teacher_logits = None
            if teacher is not None:
                teacher_logits = teacher_forward(teacher, teacher_variables, images, network.info)

            def loss_fn(params: Tree) -> tuple[jax.Array, tuple]:
                variables = Variables(optim.freeze(params, trainable), batch_stats)
                # Each image next to itself, so that both stay on their device.
                shown = jnp.repeat(images, 2, axis=0) if config.train.cosub else images
                heads, new_stats = network(variables, shown, key)
                if config.train.cosub:
                    pairs = heads[0].reshape(len(images), 2, -1)
                    per_image, parts = losses.cosub(
                        pairs[:, 0], pairs[:, 1], targets, base_loss=config.train.loss
                    )
                else:
                    per_image, parts = losses.total_loss(
                        heads,
                        targets,
                        teacher_logits,
                        kind=distil.kind,
                        alpha=distil.alpha,
                        temperature=distil.temperature,
                        reduction=distil.reduction,
                        base_loss=config.train.loss,
                    )
                if teacher_logits is not None:
                    agree = heads[-1].argmax(-1) == teacher_logits.argmax(-1)
                    parts["teacher_agreement"] = agree.astype(jnp.float32)
                metrics = {name: part.mean() for name, part in parts.items()}
                loss = per_image.mean()
                return loss, (new_stats, metrics | {"loss": loss})

            grads, (new_stats, metrics) = jax.grad(loss_fn, has_aux=True)(params)
            return grads, new_stats, metrics

        grads, batch_stats, metrics = accumulate(
            gradient,
            state.model.params,
            state.model.batch_stats,
            images,
            targets,
            noise_key,
            steps=config.train.accumulate_steps,
            replicated=replicated,
        )
        grads, metrics = axis.mean((grads, metrics))
        rate = optim.learning_rate(
            state.step,
            steps_per_epoch=plan.steps_per_epoch,
            epochs=config.schedule.epochs,
            warmup_epochs=plan.warmup_epochs,
            warmup_lr=config.schedule.warmup_lr,
            peak_lr=config.optimizer.lr,
            min_lr=config.schedule.min_lr,
            per_epoch=config.schedule.per_epoch,
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model.params)
        model = Variables(optim.apply_updates(state.model.params, updates, rate), batch_stats)
        ema = state.ema
        if ema is not None:
            ema = optim.ema_update(ema, model, config.train.ema_decay)

        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        model, opt_state, ema = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (model, opt_state, ema),
            (state.model, state.opt_state, state.ema),
        )
        skipped = jnp.where(finite, 0, 1)
        state = TrainState(
            step=state.step + 1,
            model=model,
            opt_state=opt_state,
            ema=ema,
            nonfinite_steps=jnp.where(finite, 0, state.nonfinite_steps + 1),
            nonfinite_total=state.nonfinite_total + skipped,
        )
        metrics |= {
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "nonfinite_steps": state.nonfinite_steps,
            "nonfinite_total": state.nonfinite_total,
        }
        return state, metrics

    return train_step
