"""How the reference, timm and Hugging Face name the tensors of DeiT and DeiT III."""

import re

from deit_jax.convert.mapping import Layout

# timm's key → Hugging Face's, as its files have it; {m} is "vit" for plain DeiT, which has always
# been published as a ViT, and "deit" for distilled models.
_HF_FILES = (
    (r"cls_token", r"{m}.embeddings.cls_token"),
    (r"dist_token", r"{m}.embeddings.distillation_token"),
    (r"pos_embed", r"{m}.embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(\w+)", r"{m}.embeddings.patch_embeddings.projection.\1"),
    (r"blocks\.(\d+)\.norm1\.(\w+)", r"{m}.encoder.layer.\1.layernorm_before.\2"),
    (r"blocks\.(\d+)\.norm2\.(\w+)", r"{m}.encoder.layer.\1.layernorm_after.\2"),
    (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"{m}.encoder.layer.\1.attention.attention.{qkv}.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"{m}.encoder.layer.\1.attention.output.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"{m}.encoder.layer.\1.intermediate.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"{m}.encoder.layer.\1.output.dense.\2"),
    (r"norm\.(\w+)", r"{m}.layernorm.\1"),
    (r"head_dist\.(\w+)", r"distillation_classifier.\1"),
    (r"head\.(\w+)", r"{head}.\1"),
)
# transformers 5 renamed its modules, and so the keys of `model.state_dict()`, not those of its
# files; some people save the former.
_HF_MODULES = (
    (r"encoder\.layer\.", r"layers."),
    (r"attention\.attention\.(query|key|value)", r"attention.\1"),
    (r"attention\.query", r"attention.q_proj"),
    (r"attention\.key", r"attention.k_proj"),
    (r"attention\.value", r"attention.v_proj"),
    (r"attention\.output\.dense", r"attention.o_proj"),
    (r"intermediate\.dense", r"mlp.fc1"),
    (r"(layers\.\d+)\.output\.dense", r"\1.mlp.fc2"),
)


def _hugging_face(timm_key: str, *, module: str) -> tuple[str, ...]:
    head = "classifier" if module == "vit" else "cls_classifier"
    for pattern, replacement in _HF_FILES:
        match = re.fullmatch(pattern, timm_key)
        if not match:
            continue
        key = match.expand(replacement).replace("{m}", module).replace("{head}", head)
        if "{qkv}" not in key:
            return (key,)
        return tuple(key.replace("{qkv}", name) for name in ("query", "key", "value"))
    return (timm_key,)  # LayerScale, say: no such thing there, and no such key


def _hugging_face_modules(timm_key: str, *, module: str) -> tuple[str, ...]:
    keys = []
    for key in _hugging_face(timm_key, module=module):
        for pattern, replacement in _HF_MODULES:
            key = re.sub(pattern, replacement, key)
        keys.append(key)
    return tuple(keys)


TIMM = Layout("timm", "vit", lambda key: (key,))
REFERENCE = Layout(
    "reference", "vit", lambda key: (re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", key),)
)
HF_VIT = Layout("Hugging Face ViT", "vit", lambda key: _hugging_face(key, module="vit"))
HF_DEIT = Layout("Hugging Face DeiT", "vit", lambda key: _hugging_face(key, module="deit"))
HF_VIT_MODULES = Layout(
    "Hugging Face ViT module", "vit", lambda key: _hugging_face_modules(key, module="vit")
)
HF_DEIT_MODULES = Layout(
    "Hugging Face DeiT module", "vit", lambda key: _hugging_face_modules(key, module="deit")
)
