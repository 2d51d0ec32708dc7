"""The network with its float32 head, pooled at the last real token; `get_reward` for padded rows.

Shapes: B sequences, T tokens (padded), H hidden units, K heads (1 but in an ensemble of heads).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from reward_actor.model.heads import HEADS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def head_name(network: nn.Module) -> str:
    """The attribute under which a network keeps its reward head. Raises ValueError without one."""
    for name in HEADS:
        if isinstance(getattr(network, name, None), nn.Module):
            return name
    raise ValueError(f"{type(network).__name__} has no reward head (looked for {', '.join(HEADS)})")


class Float32Head(nn.Linear):
    """A linear head that computes in float32 whatever its weight's dtype: (..., H) -> (..., K).

    A bfloat16 head would round rewards to three digits, and ties would follow. And equal rows get
    equal scores, as equal completions must rank alike: the last rows of a matrix product are summed
    in another order than the first ones.
    """

    @classmethod
    def of(cls, head: nn.Linear) -> Float32Head:
        """A linear layer, its parameters kept."""
        new = cls(head.in_features, head.out_features, head.bias is not None, device="meta")
        new.weight = head.weight
        new.bias = head.bias
        return new

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.float()
        scores = torch.stack([(hidden * row).sum(-1) for row in self.weight.float()], -1)
        return scores if self.bias is None else scores + self.bias.float()


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh,
}  # fmt: skip
"""What may stand between a head's layers, by the names of `reward_actor.model.heads`."""


class Float32Layers(nn.Sequential):
    """Linear layers with activations between them, in float32: (..., H) -> (..., K).

    Row after row, as equal rows must get equal scores here, too.
    """

    @classmethod
    def of(cls, layers: nn.Sequential) -> Float32Layers:
        """The head of a network, its parameters kept. Raises ValueError for layers of another
        kind."""
        inner = [layer for layer in layers if not isinstance(layer, nn.Dropout | nn.Identity)]
        for layer in inner:
            if not isinstance(layer, (nn.Linear, *ACTIVATIONS.values())):
                raise ValueError(f"the reward head holds a {type(layer).__name__}")
        return cls(*inner)

    @property
    def linear(self) -> list[nn.Linear]:
        return [layer for layer in self if isinstance(layer, nn.Linear)]

    @property
    def in_features(self) -> int:
        return self.linear[0].in_features

    @property
    def out_features(self) -> int:
        return self.linear[-1].out_features

    def forward(self, hidden: Tensor) -> Tensor:
        wide = {
            layer: (layer.weight.float(), None if layer.bias is None else layer.bias.float())
            for layer in self.linear
        }
        scores = []
        for row in hidden.float().reshape(-1, hidden.shape[-1]):
            for layer in self:
                row = layer(row) if layer not in wide else nn.functional.linear(row, *wide[layer])
            scores.append(row)
        if not scores:
            return hidden.new_zeros((*hidden.shape[:-1], self.out_features), dtype=torch.float32)
        return torch.stack(scores).view(*hidden.shape[:-1], self.out_features)


def float32_head(head: nn.Module) -> Float32Head | Float32Layers:
    """A network's head that computes in float32, its parameters kept. Raises ValueError for one
    that is not made of linear layers."""
    if isinstance(head, nn.Linear):
        return Float32Head.of(head)
    if isinstance(head, nn.Sequential):
        return Float32Layers.of(head)
    raise ValueError(f"the reward head is a {type(head).__name__}, not made of linear layers")


class RewardModel(nn.Module):
    """A `transformers` sequence classifier, pooled at the last real token.

    The one network that is trained, evaluated and served. `network` is saved and loaded by
    `transformers` itself; its head is made to compute in float32. It has one label, or one for
    each head of an ensemble.

    Rows are padded on the right and come with their lengths, without a mask: causal attention
    never looks right, so a real token cannot see padding, and the attention kernels without a mask
    are the fast ones.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        name = head_name(network)
        setattr(network, name, float32_head(getattr(network, name)))
        self.network = network

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """(B, T) ids padded on the right, (B,) lengths of at least 1 -> float32 raw scores:
        (B,), or (B, K) with several heads."""
        hidden = self.hidden_states(input_ids)
        rows = torch.arange(len(hidden), device=hidden.device)
        return cast("Tensor", self.head(hidden[rows, lengths - 1]).squeeze(-1))

    def hidden_states(self, input_ids: Tensor, **forward: Any) -> Tensor:
        """(B, T) ids -> (B, T, H): the last hidden states, and no others are kept."""
        output = self.backbone(input_ids=input_ids, use_cache=False, **forward)
        return cast("Tensor", output.last_hidden_state)

    @property
    def backbone(self) -> PreTrainedModel:
        return cast("PreTrainedModel", getattr(self.network, self.network.base_model_prefix))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def head(self) -> Float32Head | Float32Layers:
        return cast("Float32Head", getattr(self.network, head_name(self.network)))


def last_token_index(attention_mask: Tensor) -> Tensor:
    """(B, T) mask -> (B,) index of the rightmost real token.

    Raises ValueError naming the row if a row has none.
    """
    empty = (attention_mask.sum(dim=1) == 0).nonzero()
    if len(empty):
        raise ValueError(f"row {int(empty[0])} holds only padding; there is no token to pool")
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask.bool() * (positions + 1)).argmax(dim=1)


def get_reward(
    model: PreTrainedModel,
    query_responses: Tensor,
    pad_token_id: int,
    context_length: int,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards of padded rows, with the signature of Open Instruct's `get_reward` (model_utils.py).

    query_responses (B, T) ids; attention_mask (B, T) or None. Returns reward_logits (B, T),
    final_scores (B,), both float32, and sequence_lengths (B,), which are last indices.

    With a mask the pooled token is the last real one, on any padding side, whatever its id.
    Without one the result is Open Instruct's: real tokens are those that differ from
    `pad_token_id`, and the pooled one stands before the first pad after `context_length`; pads that
    come before the completion there are passed over, where Open Instruct would stop at them. Open
    Instruct's trailing axis of size 1 on reward_logits is dropped. Raises ValueError naming the row
    if a row holds only padding.
    """
    mask = query_responses != pad_token_id if attention_mask is None else attention_mask.bool()
    last = last_token_index(mask)  # an all-padding row fails here under either rule
    if attention_mask is None:
        # One pad more: what is never padded, or has no completion at all, ends at the last column.
        tails = nn.functional.pad(query_responses[:, context_length:], (0, 1), value=pad_token_id)
        is_pad = tails == pad_token_id
        ends = is_pad & ((~is_pad).cumsum(dim=1) > 0)  # pads before the completion end nothing
        last = context_length + ends.int().argmax(dim=1) - 1
    real = mask.long()
    backbone = getattr(model, model.base_model_prefix)
    hidden = backbone(
        input_ids=query_responses.masked_fill(real == 0, 0),  # padding's content never matters
        attention_mask=real,
        position_ids=real.cumsum(dim=1) - real,
        use_cache=False,
    ).last_hidden_state
    head = getattr(model, head_name(model))
    # On a copy of the hidden states in the head's dtype when it is not our Float32Head.
    logits = head(hidden.to(next(head.parameters()).dtype)).float().squeeze(-1)
    rows = torch.arange(len(logits), device=logits.device)
    return logits, logits[rows, last], last
