"""DeiT and DeiT III in plain PyTorch, with the parameter names of the PyTorch reference.

Written from the papers' description, for evaluation only; it shares no code with timm or with us.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention on [B, N, D]; the rows of qkv are [q|k|v] × [head] × [hd]."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        ]
        q, k, v = heads  # each [B, H, N, hd]
        weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """fc1, exact GELU, fc2."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc1(x)
        return self.fc2(0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0))))


class Block(nn.Module):
    """Pre-norm block; LayerScale is `gamma_1`, `gamma_2` [D] on the block itself, or absent."""

    def __init__(self, dim: int, num_heads: int, layer_scale_init: float | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.layer_scale = layer_scale_init is not None
        if self.layer_scale:
            self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale_init))
            self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale_init))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.attn(self.norm1(x))
        x = x + (self.gamma_1 * branch if self.layer_scale else branch)
        branch = self.mlp(self.norm2(x))
        return x + (self.gamma_2 * branch if self.layer_scale else branch)


class ParallelBlock(nn.Module):
    """Two attentions, then two MLPs, each pair from one input; the second's names end with 1."""

    def __init__(self, dim: int, num_heads: int, layer_scale_init: float):
        super().__init__()
        for one in ("", "1"):
            for number in (1, 2):
                setattr(self, f"norm{number}{one}", nn.LayerNorm(dim, eps=1e-6))
                gamma = nn.Parameter(torch.full((dim,), layer_scale_init))
                setattr(self, f"gamma_{number}{one and '_1'}", gamma)
            setattr(self, f"attn{one}", Attention(dim, num_heads))
            setattr(self, f"mlp{one}", Mlp(dim, 4 * dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.attn(self.norm1(x)), self.attn1(self.norm11(x))
        x = x + self.gamma_1 * first + self.gamma_1_1 * second
        first, second = self.mlp(self.norm2(x)), self.mlp1(self.norm21(x))
        return x + self.gamma_2 * first + self.gamma_2_1 * second


class PatchEmbed(nn.Module):
    """Images [B, 3, H, W] → tokens [B, P, D], row by row; drops what fills no whole patch."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class HmlpStem(nn.Module):
    """The stem of "Three things": 4, 2 and 2 pixels, batch norm and GELU; as timm's PatchEmbed."""

    def __init__(self, img_size, patch_size: int, in_chans: int, embed_dim: int, **_):
        super().__init__()
        self.img_size = img_size if isinstance(img_size, tuple) else (img_size, img_size)
        self.grid_size = tuple(side // patch_size for side in self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        width = embed_dim // 4
        steps = ((in_chans, width, 4), (width, width, 2), (width, embed_dim, 2))
        layers = []
        for inputs, outputs, side in steps:
            layers += [nn.Conv2d(inputs, outputs, side, stride=side), nn.BatchNorm2d(outputs)]
            layers += [nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class ReferenceVit(nn.Module):
    """DeiT, distilled DeiT or DeiT III; the options are those of our VisionTransformer."""

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_classes: int = 1000,
        distilled: bool = False,
        no_embed_class: bool = False,
        layer_scale_init: float | None = None,
        hmlp: bool = False,
        parallel: bool = False,
    ):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        positions = (height // patch_size) * (width // patch_size)
        if not no_embed_class:
            positions += 2 if distilled else 1
        self.distilled = distilled
        self.no_embed_class = no_embed_class
        self.patch_embed = (
            HmlpStem((height, width), patch_size, 3, embed_dim)
            if hmlp
            else PatchEmbed(patch_size, embed_dim)
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim))
        self.blocks = nn.ModuleList(
            (ParallelBlock if parallel else Block)(embed_dim, num_heads, layer_scale_init)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        if distilled:
            self.head_dist = nn.Linear(embed_dim, num_classes)
        self.eval().requires_grad_(False)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Maps [B, 3, H, W] to all tokens after the last LayerNorm, [B, N, D]."""
        x = self.patch_embed(images)
        tokens = [self.cls_token, self.dist_token] if self.distilled else [self.cls_token]
        prefix = [token.expand(len(x), -1, -1) for token in tokens]
        if self.no_embed_class:
            x = torch.cat([*prefix, x + self.pos_embed], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def heads(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(class logits,) or (class logits, distillation logits), each [B, K]."""
        x = self.forward_features(images)
        if not self.distilled:
            return (self.head(x[:, 0]),)
        return self.head(x[:, 0]), self.head_dist(x[:, 1])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, K]; distilled: the mean of the two heads'."""
        logits = self.heads(images)
        return sum(logits) / len(logits)


def timm_name(name: str) -> str:
    """timm's name of a tensor of this module."""
    return name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")


def interpolate(field: torch.Tensor, size: tuple[int, int], *, antialias: bool) -> torch.Tensor:
    """PyTorch's own bicubic resize of [h, w, D] to [H, W, D], for position embeddings."""
    x = field.permute(2, 0, 1)[None]
    x = F.interpolate(x, size=size, mode="bicubic", align_corners=False, antialias=antialias)
    return x[0].permute(1, 2, 0)
