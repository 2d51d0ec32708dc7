"""The routers of a mixture of experts: their logits, as the last forward pass left them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reward_actor.transformers_internals import router_recorders

if TYPE_CHECKING:
    from reward_actor.model.reward_model import RewardModel


class RouterLogits:
    """The logits of a mixture of experts' routers, of the last forward pass, by layer."""

    def __init__(self, model: RewardModel) -> None:
        self.logits: list[Tensor] = []
        self.found = False
        config = model.network.config.get_text_config()
        self.top_k: int = getattr(config, "num_experts_per_tok", 0) or 0
        self.coefficient: float = getattr(config, "router_aux_loss_coef", 0.0) or 0.0
        for kind, layer, place in router_recorders(model.backbone):
            for name, module in model.backbone.named_modules():
                if isinstance(module, kind) and (layer is None or f".{layer}." in f".{name}."):
                    self.found = True
                    module.register_forward_hook(partial(self._record, place))

    def _record(self, index: int, _module: nn.Module, _inputs: Any, outputs: Any) -> None:
        if torch.is_grad_enabled():
            self.logits.append(outputs[index] if isinstance(outputs, tuple) else outputs)
