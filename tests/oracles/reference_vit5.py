"""ViT-5 (arXiv 2602.08071) in plain PyTorch, with the parameter names of the authors' files.

Written from a description of the architecture, for evaluation only; it shares no code with ours.
"""

import torch
from torch import nn

from tests.oracles.reference_vit import Mlp, PatchEmbed

OPTIONS = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "num_registers")
REGISTERS_THETA = 100.0


class RMSNorm(nn.Module):
    """Divides by the root mean square of the last axis; a scale, no bias."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


class Rope(nn.Module):
    """Turns [B, H, side², hd]: the first half of the channels by row, the second by column."""

    def __init__(self, head_dim: int, theta: float):
        super().__init__()
        exponents = torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2)
        self.register_buffer("freqs", 1.0 / theta**exponents)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = round(x.shape[2] ** 0.5)
        place = torch.arange(side, dtype=self.freqs.dtype)
        turns = place[:, None] * self.freqs
        by_row = turns[:, None].expand(side, side, -1)
        by_column = turns[None].expand(side, side, -1)
        angles = torch.cat([by_row, by_column], dim=-1).reshape(side * side, -1)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


class Attention(nn.Module):
    """[class, patches, registers]: queries and keys are normalised, then turned."""

    def __init__(self, dim: int, num_heads: int, num_registers: int, linear_bias: bool):
        super().__init__()
        head_dim = dim // num_heads
        self.num_heads, self.num_registers = num_heads, num_registers
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm, self.k_norm = RMSNorm(head_dim), RMSNorm(head_dim)
        self.rope = Rope(head_dim, 10000.0)
        if num_registers:
            self.rope_reg = Rope(head_dim, REGISTERS_THETA)
        self.proj = nn.Linear(dim, dim, bias=linear_bias)

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        end = x.shape[2] - self.num_registers
        parts = [x[:, :, :1], self.rope(x[:, :, 1:end])]
        if self.num_registers:
            parts.append(self.rope_reg(x[:, :, end:]))
        return torch.cat(parts, dim=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        q, k = self.turn(self.q_norm(q)), self.turn(self.k_norm(k))
        weights = torch.softmax((q @ k.transpose(-2, -1)) / q.shape[-1] ** 0.5, dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block with LayerScale on the block itself."""

    def __init__(self, dim: int, num_heads: int, num_registers: int, linear_bias: bool):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.attn = Attention(dim, num_heads, num_registers, linear_bias)
        self.mlp = Mlp(dim, 4 * dim)
        if not linear_bias:
            self.mlp.fc1.bias = self.mlp.fc2.bias = None
        self.gamma_1 = nn.Parameter(torch.full((dim,), 1e-4))
        self.gamma_2 = nn.Parameter(torch.full((dim,), 1e-4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class ReferenceVit5(nn.Module):
    """ViT-5; without `linear_bias` as it was reproduced, with biases in patches and head alone."""

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_registers: int,
        num_classes: int = 1000,
        linear_bias: bool = True,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.reg_token = nn.Parameter(torch.zeros(1, num_registers, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, num_registers, linear_bias) for _ in range(depth)
        )
        self.norm = RMSNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        self.eval()

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "reg_token"}

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Maps [B, 3, H, W] to all tokens after the last norm, [B, N, D]."""
        x = self.patch_embed(images) + self.pos_embed
        first, last = (token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token))
        x = torch.cat([first, x, last], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, K]."""
        return self.head(self.forward_features(images)[:, 0])
