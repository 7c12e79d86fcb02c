"""timm models as oracles: small, with weights of full effect, and these weights by our names."""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from deit_jax import trees
from deit_jax.models import registry
from tests.oracles import reference_vit5
from tests.oracles.reference_vit import HmlpStem
from tests.oracles.torchvision_ops import import_torchvision

import_torchvision()

from timm.models.cait import Cait  # noqa: E402
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.eva import Eva  # noqa: E402
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock  # noqa: E402
from timm.models.regnet import RegNet, RegNetCfg  # noqa: E402
from timm.models.vision_transformer import (  # noqa: E402
    ParallelThingsBlock,
    VisionTransformer,
)

ROPE = {  # timm's options for each of ours
    "axial": {"rope_type": "cat", "rope_temperature": 100.0},
    "mixed": {"rope_type": "mixed", "rope_temperature": 10.0},
}


def fresh(name: str, *, num_classes: int, **options) -> torch.nn.Module:
    """Builds timm's twin of a registered model as timm initialises it, `options` in place of ours.

    Also of the models that timm has no name for.
    """
    chosen = registry.model_options(name) | {"num_classes": num_classes} | options
    family = registry.family(name)
    if family == "regnet":
        chosen.pop("image_size")
    chosen.pop("drop_path_mode", None)
    if chosen.get("rope") == "vit5":  # which timm lacks
        names = (*reference_vit5.OPTIONS, "num_classes", "linear_bias")
        return reference_vit5.ReferenceVit5(**{k: chosen[k] for k in names if k in chosen})
    return FRESH[family](**chosen)


def vit(*, seed: int = 0, **options) -> torch.nn.Module:
    """Builds timm's twin of our VisionTransformer(**options), randomised, in evaluation mode."""
    return randomise(fresh_vit(**options), seed)


def fresh_vit(**options) -> torch.nn.Module:
    """Builds timm's twin of our VisionTransformer(**options) as timm initialises it."""
    cls = VisionTransformerDistilled if options.pop("distilled", False) else VisionTransformer
    if rope := options.pop("rope", None):
        options |= ROPE[rope] | {"use_abs_pos_emb": options.pop("pos_embed", True)}
        options |= {"attn_type": "rope", "use_rot_pos_emb": True, "rope_grid_indexing": "xy"}
        return Eva(global_pool="token", **_renamed(options))
    if options.pop("hmlp", False):
        options["embed_layer"] = HmlpStem
    return cls(**_renamed(options))


def fresh_parallel(**options) -> torch.nn.Module:
    """Builds timm's twin of our ParallelVisionTransformer(**options) as timm initialises it."""
    return fresh_vit(block_fn=ParallelThingsBlock, **options)


def fresh_cait(**options) -> torch.nn.Module:
    """Builds timm's twin of our Cait(**options) as timm initialises it."""
    return Cait(**_renamed(options))


def fresh_resmlp(*, depth: int, layer_scale_init: float, **options) -> torch.nn.Module:
    """Builds timm's twin of our ResMlp(**options) as timm initialises it."""
    block = functools.partial(ResBlock, init_values=layer_scale_init)
    options = {"mlp_ratio": 4.0} | _renamed(options)
    return MlpMixer(num_blocks=depth, block_layer=block, norm_layer=Affine, **options)


def _renamed(options: dict) -> dict:
    renamed = {"image_size": "img_size", "layer_scale_init": "init_values"}
    return {renamed.get(key, key): value for key, value in options.items()}


def regnety(*, seed: int = 0, **options) -> torch.nn.Module:
    """Builds timm's twin of our RegNetY(**options), randomised, in evaluation mode."""
    return randomise(fresh_regnety(**options), seed)


def fresh_regnety(
    *, num_classes: int, group_width: int, drop_path_rate: float = 0.0, **options
) -> torch.nn.Module:
    """Builds timm's twin of our RegNetY(**options) as timm initialises it."""
    cfg = RegNetCfg(group_size=group_width, se_ratio=0.25, **options)
    return RegNet(cfg, num_classes=num_classes, drop_path_rate=drop_path_rate)


FRESH = {
    "vit": fresh_vit,
    "parallel": fresh_parallel,
    "cait": fresh_cait,
    "resmlp": fresh_resmlp,
    "regnet": fresh_regnety,
}


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draws every tensor so that a mistake in any of them changes the logits visibly.

    Fresh models hide mistakes: tiny position embeddings and LayerScale, unit norms, zero biases.
    """
    generator = torch.Generator().manual_seed(seed)
    # Batch norm's statistics, but no constants.
    drawn = {name for name in model.state_dict() if not name.endswith("freqs")}
    drawn |= {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or name not in drawn:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                noise = 0.5 + noise.abs()
            elif tensor.ndim == 1 or name.endswith(("alpha", "beta")):
                centre = 0.0 if name.endswith(("bias", "mean", "beta")) else 1.0
                noise = centre + 0.3 * noise
            elif name.endswith("freqs"):
                noise = 0.3 * noise
            elif not name.endswith("token") and "pos_embed" not in name:
                noise = noise / tensor[0].numel() ** 0.5
            tensor.copy_(noise)
    return model.eval()


def to_tree(tensors: dict[str, torch.Tensor]) -> dict:
    """Renames and transposes tensors with timm's names into our nested dict of NumPy arrays."""
    tree = {}
    for name, tensor in tensors.items():
        name = re.sub(r"\b(?:gamma_|ls)([12])$", r"ls\1.gamma", name)
        *path, leaf = name.split(".")
        if leaf == "num_batches_tracked":
            continue
        array = tensor.detach().numpy()
        if leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
            if "se" in path:
                array = array[:, :, 0, 0]
            array = array.transpose((2, 3, 1, 0)) if array.ndim == 4 else array.T
        if leaf in ("alpha", "beta"):
            leaf, array = {"alpha": "scale", "beta": "bias"}[leaf], array.reshape(-1)
        leaf = {"running_mean": "mean", "running_var": "var"}.get(leaf, leaf)
        node = tree
        for key in path:
            node = node.setdefault(int(key) if key.isdigit() else key, {})
        node[leaf] = np.array(array)
    return tree


def with_weights_of(torch_model: torch.nn.Module, build: Callable[..., nnx.Module]) -> nnx.Module:
    """Returns the model that `build(rngs=...)` makes, with timm's weights and statistics.

    Weights are matched strictly by name and shape; nothing is initialised on the way.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    tree = to_tree(torch_model.state_dict())
    trees.check_like(tree, nnx.to_pure_dict(state), "timm's weights")
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, tree))
