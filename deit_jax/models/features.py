"""What a model computes besides logits: features, feature maps, attention weights."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deit_jax.errors import InputError
from deit_jax.models.layers import Layer, Linear

Layers = Sequence[int] | int | None


class Identity(Layer):
    """The head of a model without classes."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x."""
        return x


def classifier(features: int, num_classes: int, **options: Any) -> Linear | Identity:
    """Returns a linear layer to float32 logits, `options` as Linear has them; an Identity for 0."""
    if not num_classes:
        return Identity()
    return Linear(features, num_classes, out_dtype=jnp.float32, **options)


class Backbone(Layer):
    """What every model does besides classifying: in evaluation, but for a call with `rngs`.

    A model brings `num_features` (D), `_pooled` (what each head reads, [B, D]) and `_create_heads`;
    one of tokens also `blocks`, `norm`, `_grid` (rows and columns of patches) and `_walk`, which
    yields each block with its inputs and its output when asked; a block with attention
    `attentions`, which yields each attention with its inputs.
    """

    num_features: int
    num_prefix = 0  # tokens before the patches
    num_registers = 0  # and after them
    has_attention = False
    has_rollout = False

    @property
    def patch_tokens(self) -> slice:
        """Returns where the patches are among the tokens."""
        return slice(self.num_prefix, -self.num_registers or None)

    def features(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Returns what the head reads, float32 [B, D]; distilled: the mean of what both read.

        It is the class token after the last norm; of ResMLP and RegNetY the mean over the image.
        """
        pooled = self._pooled(images, rngs)
        return sum(pooled) / len(pooled)

    def intermediates(
        self,
        images: jax.Array,
        layers: Layers = None,
        *,
        normalize: bool = True,
        reshape: bool = True,
    ) -> list[jax.Array]:
        """Returns what leaves the chosen blocks, float32. Of CaiT, only blocks of patches count.

        Args:
          images: [B, H, W, 3].
          layers: numbers of blocks, from 0, or below 0 from the end; one number: so many last
            blocks; None: all. Blocks after the last of them are not computed.
          normalize: applies the model's last norm to each.
          reshape: maps of the patches, [B, H/p, W/p, D]; else all tokens, [B, N, D].

        Raises:
          InputError: there is no such block.
        """
        grid = self._grid(images)
        found = self._collect(images, layers, len(self.blocks), lambda block, inputs, x: x)
        if normalize:
            found = [self.norm(x) for x in found]
        if not reshape:
            return found
        end = -self.num_registers or None  # CaiT's blocks of patches have no prefix
        maps = [x[:, :end][:, -grid[0] * grid[1] :] for x in found]
        return [x.reshape(x.shape[0], *grid, x.shape[2]) for x in maps]

    def attention_weights(self, images: jax.Array, layers: Layers = None) -> list[jax.Array]:
        """Returns how much each token of the chosen blocks takes from each, float32 [B, H, N, N].

        Parallel blocks have the heads of both branches, [B, 2H, N, N]. CaiT's blocks of the class
        token follow those of patches and are [B, H, 1, N]; the weights of the first are mixed over
        the heads and do not sum to 1.

        Args:
          images: [B, H, W, 3].
          layers: as in `intermediates`.

        Raises:
          InputError: there is no such block, or the model has no attention.
        """
        if not self.has_attention:
            raise InputError(f"a {type(self).__name__} has no attention, but `intermediates`")

        def weights(block: Any, inputs: tuple, x: jax.Array) -> jax.Array:
            return jnp.concatenate([a.weights(*own) for a, own in block.attentions(*inputs)], 1)

        return self._collect(images, layers, self.attention_depth, weights)

    def attention_rollout(self, images: jax.Array, layers: Layers = None) -> jax.Array:
        """Returns how much of each token reaches each one through the chosen blocks.

        That is the product of (A + I) / 2, where A is the mean of a block's heads (attention
        rollout, arXiv 2005.00928). `rollout[:, 0, model.patch_tokens]` is what the class token has
        of each patch.

        Args:
          images: [B, H, W, 3].
          layers: as in `intermediates`; their order does not matter.

        Returns:
          float32 [B, N, N]: of row i's token, what comes from each. Rows sum to 1.

        Raises:
          InputError: there is no such block, or the model has no attention that sums to 1.
        """
        if not self.has_rollout:
            raise InputError(
                f"a {type(self).__name__} has no attention whose weights sum to 1, so no rollout"
            )
        steps = self.attention_weights(images, sorted(chosen_of(layers, self.attention_depth)))
        eye = jnp.eye(steps[0].shape[-1])[None]
        rollout, *later = ((step.mean(1) + eye) / 2 for step in steps)
        for step in later:
            rollout = jnp.matmul(step, rollout, precision=jax.lax.Precision.HIGHEST)
        return rollout

    def attention_maxima(self, images: jax.Array) -> jax.Array:
        """Returns each attention's largest logit by magnitude, float32 [attentions].

        When they keep growing, attention becomes one-hot and training diverges (arXiv 2302.05442,
        section 2.1).
        """
        largest = [
            attention.largest_logit(*own)
            for block, inputs, _ in self._walk(images)
            for attention, own in block.attentions(*inputs)
        ]
        return jnp.stack(largest)

    def reset_classifier(
        self, num_classes: int, *, class_names: Sequence[str] = (), rngs: nnx.Rngs | None = None
    ) -> None:
        """Replaces the heads by newly initialised ones; `info` says so.

        Args:
          num_classes: 0 for none: then the model returns its features.
          class_names: of the new classes, if known.
          rngs: draws the heads; None: nnx.Rngs(0).
        """
        new = {"num_classes": num_classes, "class_names": tuple(class_names)}
        self.info = dataclasses.replace(self.info, **new)
        self._create_heads(num_classes, nnx.Rngs(0) if rngs is None else rngs)

    @property
    def attention_depth(self) -> int:
        """Returns how many blocks `attention_weights` counts."""
        return len(self.blocks)

    def _collect(
        self, images: jax.Array, layers: Layers, count: int, read: Callable[..., jax.Array]
    ) -> list[jax.Array]:
        """Returns what `read` makes of each chosen block, its inputs and its output."""
        chosen = chosen_of(layers, count)
        found = {}
        for number, step in zip(range(max(chosen) + 1), self._walk(images), strict=False):
            if number in chosen:
                found[number] = read(*step)
        return [found[number] for number in chosen]


def chosen_of(layers: Layers, count: int, what: str = "blocks") -> list[int]:
    """Returns the numbers of the chosen blocks, from 0."""
    if layers is None:
        return list(range(count))
    if isinstance(layers, int):
        chosen, right = range(count - layers, count), 1 <= layers <= count
    else:
        chosen = list(layers)
        right = chosen and all(type(n) is int and -count <= n < count for n in chosen)
    if not right:
        raise InputError(
            f"layers is {layers}, but of {count} {what} it takes a list of numbers from 0 to "
            f"{count - 1} (or -{count} to -1, from the end), or a number of last ones"
        )
    return [number % count for number in chosen]
