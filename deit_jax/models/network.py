"""A model as a pure function: its computation (`Network`) apart from its weights (`Variables`)."""

import dataclasses

import jax
from flax import nnx, struct

from deit_jax.models.registry import ModelInfo

Tree = dict[str, object]


@struct.dataclass
class Variables:
    """What a model computes with: trained parameters and BatchNorm statistics ({} without any)."""

    params: Tree
    batch_stats: Tree


@dataclasses.dataclass(frozen=True)
class Network:
    """A model's computation without its weights: the static half of an NNX module."""

    graphdef: nnx.GraphDef
    info: ModelInfo

    def __call__(
        self, variables: Variables, images: jax.Array, key: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, ...], Tree]:
        """Applies the model.

        Args:
          variables: weights, checked against this network by whoever loaded them.
          images: [B,H,W,3] normalised floats.
          key: randomness of a training pass; None evaluates.

        Returns:
          The logits of each head, float32 [B,K], and the BatchNorm statistics after the pass.
        """
        # merge matches leaves by position, hence the name and shape check at every loader.
        model = join_model(self, variables)
        if key is None:  # whatever mode the module was in when it was split
            model.eval()
            heads = model.heads(images)
        else:
            model.train()
            heads = model.heads(images, rngs=nnx.Rngs(dropout=key))
        return heads, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def split_model(model: nnx.Module) -> tuple[Network, Variables]:
    """Splits a module into its computation and its (possibly abstract) variables."""
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    variables = Variables(nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats))
    return Network(graphdef, model.info), variables


def join_model(network: Network, variables: Variables) -> nnx.Module:
    """Puts a module together: the inverse of `split_model`."""
    return nnx.merge(network.graphdef, variables.params, variables.batch_stats)
