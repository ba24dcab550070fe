"""BatchNorm whose statistics are those of the whole batch, also where several processes share it.

b = batch of this process, c = channels, h w = height and width
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from crm.names import chosen

# what the masked pass of a training step, which comes after the clean one, does with the norms after fusion
FUSION_NORMS = {
    "shared": "statistics of its own batch, and the running ones follow it as they follow the clean pass (released)",
    "separate": "statistics of its own batch; the running ones, which evaluation uses, follow the clean pass alone",
    "frozen": "the running statistics, which follow the clean pass alone",
}


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> Tensor:
        total = grad_outputs[0].clone()
        dist.all_reduce(total)
        return total


class BatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d`; in training, with `sync`, over the images of all processes (on the CPU too).

    The released code has plain BatchNorm: each process its own statistics.

    Args:
        how: what it does on the masked pass, a key of FUSION_NORMS.
    """

    def __init__(self, channels: int, sync: bool, how: str = "shared") -> None:
        super().__init__(channels)
        self.sync = sync
        chosen("fusion norm", how, FUSION_NORMS)
        self.how = how

    def forward(self, input: Float[Tensor, "b c h w"], masked: bool = False) -> Float[Tensor, "b c h w"]:
        """Normalised; in training `masked` says which pass it is."""
        masked = masked and self.training
        if masked and self.how == "frozen":
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        follows = not masked or self.how == "shared"
        if not (self.training and self.sync and dist.is_initialized()):
            if follows:
                return super().forward(input)
            return F.batch_norm(input, None, None, self.weight, self.bias, training=True, eps=self.eps)
        count = input.new_full((1,), input.numel() / input.shape[1])
        dist.all_reduce(count)
        mean = _SumOverProcesses.apply(input.sum((0, 2, 3))) / count
        centred = input - mean[:, None, None]
        variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        if follows:
            self._follow(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]

    @torch.no_grad()
    def _follow(self, mean: Float[Tensor, " c"], variance: Float[Tensor, " c"]) -> None:
        """Moves the running statistics as `nn.BatchNorm2d` does."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum or 0.1)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum or 0.1)
