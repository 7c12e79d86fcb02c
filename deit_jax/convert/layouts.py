"""How PyTorch files name the tensors of our models: timm, the reference, Hugging Face, torchvision.

Our modules carry timm's names. Each other layout renames timm's keys by a table of patterns, which
are applied one after another.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

# "{m}" is "vit" for plain DeiT, which has always been published as a ViT, and "deit" for distilled
# models.
_HUGGING_FACE = (
    (r"^cls_token$", r"{m}.embeddings.cls_token"),
    (r"^dist_token$", r"{m}.embeddings.distillation_token"),
    (r"^pos_embed$", r"{m}.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", r"{m}.embeddings.patch_embeddings.projection."),
    (r"^norm\.", r"{m}.layernorm."),
    (r"^head_dist\.", r"distillation_classifier."),
    (r"^head\.", r"{head}."),
    (r"^blocks\.", r"{m}.encoder.layer."),
    (r"\.norm1\.", r".layernorm_before."),
    (r"\.norm2\.", r".layernorm_after."),
    (r"\.attn\.qkv\.", r".attention.attention.{qkv}."),
    (r"\.attn\.proj\.", r".attention.output.dense."),
    (r"\.mlp\.fc1\.", r".intermediate.dense."),
    (r"\.mlp\.fc2\.", r".output.dense."),
)
# transformers 5 renamed its modules, and so the keys of `model.state_dict()`, not those of its
# files; some people save the former.
_HUGGING_FACE_5 = (
    (r"encoder\.layer\.", r"layers."),
    (r"attention\.attention\.(q|k|v)[a-z]+", r"attention.\1_proj"),
    (r"attention\.output\.dense", r"attention.o_proj"),
    (r"intermediate\.dense", r"mlp.fc1"),
    (r"(layers\.\d+)\.output\.dense", r"\1.mlp.fc2"),
)
_TORCHVISION = (
    (r"^head\.", r""),
    (r"^s(\d+)\.b(\d+)\.", r"trunk_output.block\1.block\1-\2."),
    (r"\.conv1\.", r".f.a."),
    (r"\.conv2\.", r".f.b."),
    (r"\.conv3\.", r".f.c."),
    (r"\.se\.", r".f.se."),
    (r"\.downsample\.", r".proj."),
    (r"\.conv\.", r".0."),
    (r"\.bn\.", r".1."),
)
_REFERENCE_PARALLEL = (
    (r"\.attns\.0\.norm\.", r".norm1."),
    (r"\.attns\.1\.norm\.", r".norm11."),
    (r"\.ffns\.0\.norm\.", r".norm2."),
    (r"\.ffns\.1\.norm\.", r".norm21."),
    (r"\.attns\.0\.ls\.gamma$", r".gamma_1"),
    (r"\.attns\.1\.ls\.gamma$", r".gamma_1_1"),
    (r"\.ffns\.0\.ls\.gamma$", r".gamma_2"),
    (r"\.ffns\.1\.ls\.gamma$", r".gamma_2_1"),
    (r"\.(?:attn|ffn)s\.0\.(attn|mlp)\.", r".\1."),
    (r"\.(?:attn|ffn)s\.1\.(attn|mlp)\.", r".\g<1>1."),
)
_RESMLP = (
    (r"(norm\d?)\.weight$", r"\1.alpha"),
    (r"(norm\d?)\.bias$", r"\1.beta"),
    (r"\.ls([12])\.gamma$", r".ls\1"),
)
_REFERENCE_RESMLP = (
    *_RESMLP,
    (r"\.ls([12])$", r".gamma_\1"),
    (r"^stem\.", r"patch_embed."),
    (r"\.linear_tokens\.", r".attn."),
    (r"\.mlp_channels\.", r".mlp."),
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One family's naming of tensors.

    `rename` maps timm's key of a tensor to this layout's; three keys mean that the tensor's
    rows are stored as three (query, key, value). `family` is that of `registry.family`. Vectors
    whose key ends with one of `rows` are stored as [1, 1, D].
    """

    name: str
    family: str
    rename: Callable[[str], tuple[str, ...]] = lambda key: (key,)
    rows: tuple[str, ...] = ()

    def key(self, timm_key: str) -> str:
        """Returns the one key (the first of three) that stands for a timm key."""
        return self.rename(timm_key)[0]


def _substitute(key: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        key = re.sub(pattern, replacement, key)
    return key


def _hugging_face(key: str, *, module: str, version_5: bool = False) -> tuple[str, ...]:
    head = "classifier" if module == "vit" else "cls_classifier"
    key = _substitute(key, _HUGGING_FACE).replace("{m}", module).replace("{head}", head)
    parts = ("query", "key", "value") if "{qkv}" in key else ("",)
    keys = (key.replace("{qkv}", part) for part in parts)
    return tuple(_substitute(key, _HUGGING_FACE_5 if version_5 else ()) for key in keys)


def _torchvision(key: str) -> tuple[str, ...]:
    # torchvision counts blocks from 0.
    key = _substitute(key, _TORCHVISION)
    return (re.sub(r"-(\d+)\.", lambda block: f"-{int(block[1]) - 1}.", key, count=1),)


def _gamma(key: str) -> str:
    return re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", key)


def _transformers(name: str, **options: object) -> Layout:
    return Layout(f"Hugging Face {name}", "vit", functools.partial(_hugging_face, **options))


TIMM_VIT = Layout("timm", "vit")
REFERENCE = Layout("reference", "vit", lambda key: (_gamma(key).removeprefix("rope."),))
TIMM_ROPE = Layout("timm", "vit", lambda key: (_gamma(key),))  # RoPE-ViT is of timm's `eva.py`
CAIT = Layout("timm", "cait", TIMM_ROPE.rename)  # also the reference's
TIMM_PARALLEL = Layout("timm", "parallel")
REFERENCE_PARALLEL = Layout(
    "reference", "parallel", lambda key: (_substitute(key, _REFERENCE_PARALLEL),)
)
HF_VIT = _transformers("ViT", module="vit")
HF_DEIT = _transformers("DeiT", module="deit")
TIMM_RESMLP = Layout(
    "timm", "resmlp", lambda key: (_substitute(key, _RESMLP),), rows=(".alpha", ".beta")
)
REFERENCE_RESMLP = Layout("reference", "resmlp", lambda key: (_substitute(key, _REFERENCE_RESMLP),))
TIMM_REGNET = Layout("timm", "regnet")
TORCHVISION = Layout("torchvision", "regnet", _torchvision)
ALL = (  # in the order in which `detect` tries them
    CAIT,
    TIMM_PARALLEL,
    REFERENCE_PARALLEL,
    TIMM_ROPE,
    REFERENCE,
    TIMM_VIT,
    HF_VIT,
    HF_DEIT,
    _transformers("ViT module", module="vit", version_5=True),
    _transformers("DeiT module", module="deit", version_5=True),
    TIMM_RESMLP,
    REFERENCE_RESMLP,
    TIMM_REGNET,
    TORCHVISION,
)
