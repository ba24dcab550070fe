"""One Swin branch: four normalised maps, strides 4 to 32, from the image of one modality.

b = batch, h w = height and width in tokens (H W in pixels), c = channels, i = input channels
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from timm.layers import PatchEmbed
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from crm.model.feed_forward import feed_forward
from crm.model.normed import normed_linear
from crm.model.window_attention import Windows, window_attention

STAGES = 4
PATCH = 4  # side of a token, pixels


class _Draws(NamedTuple):
    first: int
    images: int
    whole: int
    generator: torch.Generator | None


_drawn: ContextVar[_Draws | None] = ContextVar("_drawn", default=None)


@contextmanager
def drawn_for(first: int, images: int, whole: int, generator: torch.Generator | None = None) -> Iterator[None]:
    """Inside, random draws per image are made for a batch of `whole` images, of which these are some, from `first` on.

    So a batch computed in parts, each from the same seed, has the draws that it has as a whole.

    Args:
        generator: None is the global one.
    """
    token = _drawn.set(_Draws(first, images, whole, generator))
    try:
        yield
    finally:
        _drawn.reset(token)


class StochasticDepth(nn.Module):
    """Drops a residual branch for whole images in training and scales the others (timm's DropPath, drawn per batch)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        if not (self.training and self.rate):
            return x
        first, images, whole, generator = _drawn.get() or _Draws(0, len(x), len(x), None)
        draws = torch.rand(len(x) // images, whole, device=x.device, generator=generator)[:, first : first + images]
        kept = (draws >= self.rate).to(x.dtype) / (1 - self.rate)
        return x * kept.view(-1, *[1] * (x.ndim - 1))


def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """What the block makes of x; computed once more in the backward pass, with the draws that it has now.

    A GPU's backward pass is in a thread of its own, which knows nothing of `drawn_for`.
    """
    work = block if torch.compiler.is_compiling() else partial(copy_context().run, block)
    found = checkpoint(work, x, use_reentrant=False)
    assert isinstance(found, Tensor)
    return found


class Block(SwinTransformerBlock):
    """timm's block with the attention windows of the released code.

    The map is padded, then rolled, then partitioned, and always shifted, however small it is (timm rolls first). Padded
    tokens are attended to: their query, key and value are the bias. The two linear layers run on real tokens only.
    """

    def __init__(self, channels: int, heads: int, window: int, shift: int, drop_path: float) -> None:
        super().__init__(
            channels,
            input_resolution=(window, window),
            num_heads=heads,
            window_size=window,
            shift_size=shift,
            always_partition=True,
            dynamic_mask=True,
        )
        self.drop_path1 = self.drop_path2 = StochasticDepth(drop_path)

    def _normed_attn(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        bias = F.embedding(self.attn.relative_position_index, self.attn.relative_position_bias_table).permute(2, 0, 1)
        windows = Windows(self.window_size[0], self.shift_size[0])
        qkv = normed_linear(x, self.norm1, self.attn.qkv.weight)
        return self.attn.proj(window_attention(qkv, self.attn.qkv.bias, bias, windows))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        x = x + self.drop_path1(self._normed_attn(x))
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        assert isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear)
        return x + self.drop_path2(feed_forward(x, fc1, fc2, "gelu", self.norm2))


class Merge(PatchMerging):
    """timm's merging of 2 x 2 tokens into one."""

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b _ _ _"]:
        b, height, width, channels = x.shape
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.reshape(b, x.shape[1] // 2, 2, x.shape[2] // 2, 2, channels).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return normed_linear(x, self.norm, self.reduction.weight)


class Stage(nn.Module):
    """The blocks of one stage and, except after the last, the merging of 2 x 2 tokens into one."""

    def __init__(self, channels: int, heads: int, window: int, drop_path: Sequence[float], merge: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(Block(channels, heads, window, window // 2 * (i % 2), rate) for i, rate in enumerate(drop_path))
        )
        self.merge = Merge(channels) if merge else nn.Identity()


class SwinBranch(nn.Module):
    """Swin of one modality as in the released code, with a learned token for hidden places.

    Linear layers keep PyTorch's initialisation; bias tables and the mask token are truncated normal, std 0.02.

    Args:
        channels: of the image, 3 or 1.
        embed: channels of the first stage.
        drop_path: stochastic depth of the last block; grows linearly from 0.
        shared: another branch; stages `share_from` and later are its, merging included.
    """

    def __init__(
        self,
        channels: int,
        embed: int,
        depths: Sequence[int],
        heads: Sequence[int],
        window: int,
        drop_path: float,
        shared: "SwinBranch | None" = None,
        share_from: int = STAGES,
    ) -> None:
        super().__init__()
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu").split(list(depths))
        self.patch_embed = PatchEmbed(
            None, PATCH, channels, embed, norm_layer=nn.LayerNorm, strict_img_size=False, output_fmt="NHWC"
        )
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, embed, 1, 1), std=0.02))
        self.stages = nn.ModuleList(
            shared.stages[i]
            if shared is not None and i >= share_from
            else Stage(embed * 2**i, heads[i], window, rates[i].tolist(), merge=i + 1 < STAGES)
            for i in range(STAGES)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(embed * 2**i) for i in range(STAGES))
        self.recompute = False  # blocks' activations in the backward pass, to save memory

    def forward(
        self, image: Float[Tensor, "b i H W"], hidden: Bool[Tensor, "b h w"] | None
    ) -> list[Float[Tensor, "b _ _ _"]]:
        """Maps of strides 4, 8, 16, 32; where `hidden`, the token's embedding is replaced by the mask token."""
        x = self.patch_embed(image)
        if hidden is not None:
            x = torch.where(hidden[..., None], self.mask_token.flatten().to(x.dtype), x)
        maps = []
        for stage, norm in zip(self.stages, self.norms, strict=True):
            for block in stage.get_submodule("blocks").children():
                x = _recomputed(block, x) if self.recompute and self.training else block(x)
            maps.append(norm(x).permute(0, 3, 1, 2))
            x = stage.merge(x)
        return maps
