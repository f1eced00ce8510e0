# SPDX-License-Identifier: Apache-2.0
"""Policy `snapkv`: each head keeps the prompt tokens that its last queries attend to most.

After SnapKV (arXiv 2404.14469), as a baseline: what is kept stays in 16 bit, the rest is dropped.
"""

import torch

from sglang_diffxkv.kernels.gpu.transfer import upload
from sglang_diffxkv.kernels.layout import PageLayout
from sglang_diffxkv.policy.budgeting.caps import full_bytes
from sglang_diffxkv.policy.methods.prompt import PromptPolicy
from sglang_diffxkv.policy.settings import ConfigError, PolicySettings


class SnapKVPolicy(PromptPolicy):
    """The top `layer_caps` share of a sequence's tokens, by pooled importance, per layer and head.

    One page may be kept in full while others lose everything, so nothing less than a full page can
    be reserved for an open one.
    """

    name = "snapkv"

    def __init__(self, config: PolicySettings, layout: PageLayout, num_layers: int) -> None:
        super().__init__(config, layout, num_layers)
        if max(self.shares) == 1:
            raise ConfigError(
                f"policy {self.name!r} needs layer_caps below 1: "
                "the share of tokens that each head keeps"
            )
        self.caps = [full_bytes(layout)] * num_layers

    @property
    def expected_share(self) -> float:
        return sum(self.shares) / len(self.shares)

    def budgets(self, scores: torch.Tensor, protected: int) -> torch.Tensor:
        tokens = scores.shape[-1]
        counts = [max(round(share * tokens), protected) for share in self.shares]
        return upload(torch.tensor(counts), scores.device)
