"""What most reward servers hold: a model of transformers and its tokenizer, batches padded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

# Sequences in one padded forward pass.
_BATCH_SIZE = 16


class PlainModel:
    """Scores sequences in the order given, in batches of 16 padded on the right, SDPA."""

    def __init__(self, directory: str, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._network = AutoModelForSequenceClassification.from_pretrained(
            directory, dtype=getattr(torch, dtype), use_safetensors=True
        ).eval()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        rewards: list[float] = []
        for start in range(0, len(sequences), _BATCH_SIZE):
            batch = sequences[start : start + _BATCH_SIZE]
            width = max(map(len, batch))
            # transformers pools at the last token that is not the pad, id 0.
            input_ids = torch.zeros(len(batch), width, dtype=torch.long)
            for row, ids in enumerate(batch):
                input_ids[row, : len(ids)] = torch.tensor(ids)
            logits = self._network(
                input_ids=input_ids, attention_mask=(input_ids != 0).long(), use_cache=False
            ).logits
            rewards += logits.float().squeeze(-1).tolist()
        return rewards
