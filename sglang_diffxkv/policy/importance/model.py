# SPDX-License-Identifier: Apache-2.0
"""How much damage losing a token would do, predicted when its page is sealed.

Its measure is T, the sum over the queries of a second reading of the text of the squared attention
that each pays to the token (`calibrate.importance`). The text is read again because that needs all
of it, whatever a question may ask for (KVzip, arXiv 2505.23416); attention is squared because an
error that it weighs counts by its square in the divergence of what follows; and T is predicted,
because a second reading costs more than the first (KVzap, arXiv 2601.07891, does so from hidden
states). `docs/decisions/018` has the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import silu

from sglang_diffxkv.kernels.gpu.transfer import upload
from sglang_diffxkv.policy.importance.features import Rotary, features

MOST_LOG = 8.0
"""Of log T: what is predicted for tokens unlike all that were learnt from must not overflow."""


@dataclass(frozen=True)
class ImportanceModel:
    """A perceptron of one hidden layer for each layer and KV head, and a linear part beside it.

    Attributes:
        rotary: of the model's keys.
        weight: fp32 [L, H, F, J + 1], into J hidden units and, the last column, the linear part.
        bias: fp32 [L, H, J + 1]. output: fp32 [L, H, J], of the hidden units.
    """

    rotary: Rotary
    weight: torch.Tensor
    bias: torch.Tensor
    output: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name."""
        return {"weight": self.weight, "bias": self.bias, "output": self.output}

    def to(self, device: torch.device) -> ImportanceModel:
        """The model on a device."""
        moved = {name: upload(tensor, device) for name, tensor in self.tensors().items()}
        return ImportanceModel(self.rotary, **moved)

    def of_heads(self, heads: slice) -> ImportanceModel:
        """That of some KV heads of every layer."""
        mine = {name: tensor[:, heads].clone() for name, tensor in self.tensors().items()}
        return ImportanceModel(self.rotary, **mine)

    def predict(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """T of tokens of one layer: fp32 [..., H, 64] of keys and values [..., 64, H, D].

        NaN where one of them is no finite number.
        """
        x = features(keys, values, self.rotary).movedim(-2, 0)  # [H, ..., 64, F]
        flat = x.flatten(1, -2)
        hidden = torch.baddbmm(self.bias[layer][:, None], flat, self.weight[layer])
        units, linear = hidden[..., :-1], hidden[..., -1]
        log = linear + (silu(units) @ self.output[layer][..., None])[..., 0]
        log = log.masked_fill(log.isinf(), torch.nan)  # of an infinite key or value
        return log.clamp(max=MOST_LOG).exp().view(x.shape[:-1]).movedim(0, -2)
