"""The training state, and the pure train and eval steps that the loop compiles."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import NamedSharding

from deit_jax import losses, mixing, optim, shares
from deit_jax.accumulate import accumulate
from deit_jax.models import registry
from deit_jax.models.layers import TrainingRngs
from deit_jax.models.registry import ModelInfo

if TYPE_CHECKING:  # the step itself runs without ml_collections, which GPU hosts may lack
    from ml_collections import ConfigDict

    from deit_jax.config import RunPlan

Tree = dict[str, object]


@struct.dataclass
class Variables:
    """What a model computes with: trained parameters and BatchNorm statistics ({} without any)."""

    params: Tree
    batch_stats: Tree


@struct.dataclass
class TrainState:
    """Everything that a run carries from one step to the next, and all that a checkpoint holds.

    Attributes:
      step: int32 scalar, batches consumed so far; data position and randomness follow from it.
      model: parameters and statistics in training, float32.
      opt_state: the optimiser's moments.
      ema: moving average of `model`, or None where it is off.
      nonfinite_steps: int32 scalar, steps skipped in a row for a non-finite loss or gradient.
      nonfinite_total: int32 scalar, steps skipped in the whole run.
    """

    step: jax.Array
    model: Variables
    opt_state: optax.OptState
    ema: Variables | None
    nonfinite_steps: jax.Array
    nonfinite_total: jax.Array


@dataclasses.dataclass(frozen=True)
class Network:
    """A model's computation without its weights: the static half of an NNX module."""

    graphdef: nnx.GraphDef
    info: ModelInfo

    def __call__(
        self,
        variables: Variables,
        images: jax.Array,
        key: jax.Array | None = None,
        *,
        axis_name: str | None = None,
    ) -> tuple[tuple[jax.Array, ...], Tree]:
        """Applies the model.

        Args:
          variables: weights, checked against this network by whoever loaded them.
          images: [B,H,W,3] normalised floats.
          key: randomness of a training pass; None evaluates.
          axis_name: the axis over which devices share the batch, under pmap.

        Returns:
          The logits of each head, float32 [B,K], and the BatchNorm statistics after the pass.
        """
        # merge matches leaves by position, hence the name and shape check at every loader.
        model = nnx.merge(self.graphdef, variables.params, variables.batch_stats)
        rngs = None if key is None else TrainingRngs(axis_name, dropout=key)
        heads = model.heads(images, rngs=rngs)
        return heads, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def split_model(model: nnx.Module) -> tuple[Network, Variables]:
    """Splits a module into its computation and its (possibly abstract) variables."""
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    variables = Variables(nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats))
    return Network(graphdef, model.info), variables


def join_model(network: Network, variables: Variables) -> nnx.Module:
    """The inverse of `split_model`."""
    return nnx.merge(network.graphdef, variables.params, variables.batch_stats)


def new_state(
    model: Variables, optimizer: optax.GradientTransformation, *, ema: bool
) -> TrainState:
    """A state at step 0. The moving average starts as a copy of the weights (reference)."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        model=model,
        opt_state=optimizer.init(model.params),
        ema=jax.tree.map(jnp.copy, model) if ema else None,
        nonfinite_steps=jnp.zeros((), jnp.int32),
        nonfinite_total=jnp.zeros((), jnp.int32),
    )


def step_keys(seed: int, step: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """The keys of a training step: of its augmentation, and of the network's own noise."""
    augment_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return augment_key, noise_key


def make_augment(
    config: "ConfigDict",
    plan: "RunPlan",
    *,
    replicated: NamedSharding | None = None,
    axis_name: str | None = None,
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
            images = mixing.random_erasing(
                erase_key, images, prob=config.mixing.random_erasing, axis_name=axis_name
            )
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
            axis_name=axis_name,
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
    axis_name: str | None = None,
) -> Callable[[TrainState, Variables | None, dict], tuple[TrainState, dict]]:
    """Builds the pure training step of a recipe.

    Args:
      config: a validated config.
      plan: its derived numbers.
      network: the student.
      optimizer: without learning rate (`optim.make_optimizer`).
      teacher: the teacher's computation where the recipe distils.
      replicated: sharding of small draws on the mesh; keeps mixing free of communication.
      axis_name: the axis over which devices share the batch, under pmap; `batch` is then the
        device's own rows, and gradients and metrics are averaged over the axis.

    Returns:
      step(state, teacher_variables, batch) → (state, metrics), to be jitted with the state
      donated. `batch` holds uint8 images [B,H,W,3] and int32 labels [B]. Metrics are float32
      scalars: means over the global batch (`loss`, its parts `base` and `distill` or `cosub`,
      `teacher_agreement`), `learning_rate`, `grad_norm`, and the state's two skip counters.
      A step whose loss or gradient is not finite changes only the counters and `step`.
    """
    distil = config.distill
    augment = make_augment(config, plan, replicated=replicated, axis_name=axis_name)

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
                heads, new_stats = network(variables, shown, key, axis_name=axis_name)
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
        grads, metrics = shares.mean((grads, metrics), axis_name)
        rate = optim.learning_rate(
            state.step,
            steps_per_epoch=plan.steps_per_epoch,
            epochs=config.schedule.epochs,
            warmup_epochs=config.schedule.warmup_epochs,
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


def teacher_forward(
    teacher: Network, variables: Variables, images: jax.Array, student: ModelInfo
) -> jax.Array:
    """The teacher's logits [B,K] on the student's augmented batch, without gradient.

    The teacher sees what the student sees, mixing and erasing included (reference), moved from the
    student's to its own mean and standard deviation where they differ. A convolutional teacher
    sees the student's resolution, as in the reference; a transformer, which knows only its own,
    the images resized to that by an antialiased cubic filter, which is PIL's bicubic but for its
    rounding.
    """
    size = registry.fixed_size(teacher.info)
    if size is not None and images.shape[1:3] != (size, size):
        images = jax.image.resize(images, (len(images), size, size, 3), "cubic")
    if (teacher.info.mean, teacher.info.std) != (student.mean, student.std):
        own = [jnp.array(x) for x in (teacher.info.mean, teacher.info.std)]
        shown = [jnp.array(x) for x in (student.mean, student.std)]
        images = (images * shown[1] + shown[0] - own[0]) / own[1]
    heads, _ = teacher(variables, images)
    return jax.lax.stop_gradient(sum(heads) / len(heads))


def make_eval_step(network: Network) -> Callable[[dict[str, Variables], dict], dict]:
    """Builds the pure evaluation step.

    Returns:
      step(weights, batch) → sums. `weights` maps a prefix ("", "ema_", ...) to variables; `batch`
      holds uint8 images [B,H,W,3], int32 labels [B] and a mask [B] that is 0 on padding rows. Sums
      are float32 scalars over the unmasked rows: `num_examples`, and per prefix `top1`, `top5`
      (top-K for fewer than 5 classes), `loss` (plain cross-entropy), and for distilled models
      `top1_cls` and `top1_dist`, each head alone.
    """
    mean, std = network.info.mean, network.info.std

    def eval_step(weights: dict[str, Variables], batch: dict) -> dict:
        images = mixing.normalize(batch["image"], mean, std)
        labels, mask = batch["label"], batch["mask"].astype(jnp.float32)
        sums = {"num_examples": mask.sum()}
        for prefix, variables in weights.items():
            heads, _ = network(variables, images)
            logits = sum(heads) / len(heads)
            _, ranked = jax.lax.top_k(logits, min(5, logits.shape[-1]))
            hits = ranked == labels[:, None]
            per_image = {
                "top1": hits[:, 0],
                "top5": hits.any(-1),
                "loss": losses.cross_entropy(logits, labels),
            }
            if len(heads) == 2:
                per_image["top1_cls"] = heads[0].argmax(-1) == labels
                per_image["top1_dist"] = heads[1].argmax(-1) == labels
            for name, values in per_image.items():
                sums[prefix + name] = jnp.where(mask > 0, values, 0).sum(dtype=jnp.float32)
        return sums

    return eval_step


def make_attention_probe(network: Network) -> Callable[[Variables, jax.Array], jax.Array]:
    """Builds probe(variables, images) → the largest attention logit by magnitude, float32 [].

    Of all blocks, heads and uint8 `images` [B,H,W,3]: a sign of divergence before the loss shows
    it. One more forward pass, without augmentation and noise.
    """

    def probe(variables: Variables, images: jax.Array) -> jax.Array:
        images = mixing.normalize(images, network.info.mean, network.info.std)
        return join_model(network, variables).attention_maxima(images).max()

    return probe
