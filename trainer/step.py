"""One optimizer step: forward, loss and backward of every micro-batch, then the update.

Legend: S sequences in a micro-batch, W workers.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from trainer.config.train import TrainConfig
from trainer.data.comparisons import Comparisons
from trainer.data.micro_batches import global_batch, plan, steps_per_epoch, with_noise
from trainer.errors import TrainingError
from trainer.loss import Labels, comparison_losses, pair_counts, router_loss
from trainer.network import zero
from trainer.network.packed import PackedForward, row_weights, sequences_of

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from numpy.typing import NDArray

    from trainer.data.split import TrainingData


class Stepper:
    """An engine with its data: takes steps."""

    def __init__(self, engine: DeepSpeedEngine, config: TrainConfig, data: TrainingData) -> None:
        self.engine = engine
        self.config = config
        self.data = data
        self.use = lru_cache(maxsize=1)(data.use)
        self.forward = PackedForward(engine, config.training.packing)
        routers = engine.module.routers
        wanted = config.loss.router_coefficient
        self.router_coefficient = routers.coefficient if wanted is None else wanted
        if not routers.found:
            if wanted:
                raise ValueError(
                    "loss.router_coefficient: this network has no routers that can be recorded"
                )
            self.router_coefficient = 0.0

    def step(self, index: int) -> dict[str, Any]:
        """Optimizer step `index` (from 0): the log's line. Raises TrainingError, with the weights
        as they were, if a loss or a gradient is not finite.

        The loss is the mean over the comparisons of the global batch, however they fall into
        micro-batches. A mixture of experts adds `router_coefficient` times its router loss, which
        is of each micro-batch by itself, weighted by its comparisons.
        """
        began = time.perf_counter()
        training, train = self.config.training, self.data.train
        workers, rank = dist.get_world_size(), dist.get_rank()
        num_used, size = self.data.num_used, training.global_batch_pairs
        epoch = index // steps_per_epoch(num_used, size)
        batch = self.use(epoch)[global_batch(num_used, size, training.seed, index)]
        micro_batches = plan(
            train, batch, training.micro_batch_tokens, workers, packed=self.forward.packed
        )[rank]
        rates = self.engine.get_lr()
        totals = _Totals(self.engine.device)
        for number, mine in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(number == len(micro_batches) - 1)
            self._run_micro_batch(mine, len(batch), index, totals)
        grad_norm = zero.step(self.engine, index)

        sums = totals.reduced()
        seconds = time.perf_counter() - began
        num_pairs = max(1.0, sums["num_pairs"])
        return {
            "step": index + 1,
            "epoch": epoch,
            "loss": sums["loss"] / len(batch),
            **(
                {"router_loss": sums["router_loss"] / len(batch)} if self.router_coefficient else {}
            ),
            "accuracy": sums["num_correct"] / num_pairs,
            # Of raw scores: what normalises them is measured after the last step.
            "raw_margin": sums["sum_margin"] / num_pairs,
            "min_raw_score": sums["min_raw_score"],
            "mean_raw_score": sums["sum_raw_score"] / sums["num_sequences"],
            "max_raw_score": sums["max_raw_score"],
            "learning_rate": rates[0],
            "grad_norm": grad_norm,
            "num_pairs": int(sums["num_pairs"]),
            "pairs_per_s": len(batch) / seconds,
            "tokens_per_s": train.num_tokens(batch.tolist()) / seconds,
            "padding_saved": 1 - sums["num_rows"] / sums["num_padded"],
            "memory_mb": sums["memory_mb"],
        }

    def _run_micro_batch(
        self, mine: Sequence[int], num_comparisons: int, index: int, totals: _Totals
    ) -> None:
        train, config = self.data.train, self.config.loss
        sequences = [ids for i in mine for ids in self._sequences(i, index)]
        batches = self.forward.plan(sequences)
        outputs = self.forward.run(batches, len(sequences))
        labels = Labels.of(train, mine, self.engine.device)
        result = comparison_losses(outputs, labels, config, self.data.has_ties)
        self._check_losses(result.losses, mine, index)
        # DeepSpeed averages over the workers, hence their number.
        share = dist.get_world_size() / num_comparisons
        loss = result.losses.sum() * share
        balance = loss.new_zeros(())
        if self.router_coefficient:
            weights = torch.from_numpy(row_weights(batches, len(sequences)))
            routers = self.engine.module.routers
            balance = router_loss(routers.logits, routers.top_k, weights.to(loss.device))
            loss = loss + self.router_coefficient * balance * (share * len(mine))
        self.engine.backward(loss, scale_wrt_gas=False)
        bad = self.engine.module.bad_rows()
        if bad is not None and bad.any():
            owners = [i for i in mine for _ in range(*train.starts[i : i + 2])]
            found = [n for n in sequences_of(batches, bad) if n < len(owners)]
            raise self._failure(index, "gradient", sorted({owners[n] for n in found}) or mine)
        if sequences:
            rows = sum(batch.num_rows for batch in batches)
            padded = len(sequences) * max(map(len, sequences))
            totals.add(result.losses, result.rewards, labels, rows, padded)
            totals.add_router_loss(balance * len(mine))

    def _sequences(self, comparison: int, step: int) -> list[list[int]]:
        """Of the comparison, as the step sees them: the same on every worker."""
        sequences, training = self.data.train.sequences(comparison), self.config.training
        if not training.token_noise:
            return sequences
        random = np.random.Generator(np.random.PCG64([training.seed, step, comparison, 2]))
        return with_noise(sequences, training.token_noise, self.data.train.ids, random)

    def _check_losses(self, losses: Tensor, mine: Sequence[int], index: int) -> None:
        bad = np.flatnonzero(~torch.isfinite(losses.detach()).cpu().numpy()).tolist()
        if bad:
            raise self._failure(index, "loss", [mine[i] for i in bad])

    def _failure(self, index: int, what: str, whose: Sequence[int]) -> TrainingError:
        rows = ", ".join(self.data.train.where(i) for i in whose[:3])
        more = f" and {len(whose) - 3} more" if len(whose) > 3 else ""
        return TrainingError(
            f"step {index + 1}, rank {dist.get_rank()}: the {what} is not finite for {rows}{more}; "
            "the weights are as they were. Look at these samples, or try a lower "
            "optimizer.learning_rate"
        )

    def score(self, comparisons: Comparisons) -> NDArray[np.float32]:
        """(S,) or (S, A) raw scores of all sequences, computed by all workers, known to each."""
        workers, rank = dist.get_world_size(), dist.get_rank()
        everything = range(len(comparisons))
        budget = self.config.training.micro_batch_tokens
        micro_batches = plan(comparisons, everything, budget, workers, packed=self.forward.packed)[
            rank
        ]
        num_heads = self.engine.module.model.head.out_features
        # Each worker fills in its sequences and leaves zeros elsewhere: a sum puts them together.
        scores = torch.zeros(comparisons.num_sequences, num_heads, device=self.engine.device)
        self.engine.eval()
        with torch.no_grad():
            for mine in micro_batches:
                where = [n for i in mine for n in range(*comparisons.starts[i : i + 2])]
                sequences = [comparisons.sequence(n) for n in where]
                outputs = self.forward.run(self.forward.plan(sequences), len(sequences))
                scores[where] = outputs.view(len(where), num_heads)
        self.engine.train()
        dist.all_reduce(scores)
        gathered: NDArray[np.float32] = scores.squeeze(-1).cpu().numpy()
        return gathered


_SUMS = (
    "loss", "num_correct", "sum_margin", "num_pairs", "sum_raw_score", "num_sequences",
    "num_rows", "num_padded", "router_loss",
)  # fmt: skip


class _Totals:
    """Sums and extremes over a step's micro-batches, and then over the workers."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self._highest = torch.full((3,), -math.inf, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, losses: Tensor, rewards: Tensor, labels: Labels, rows: int, padded: int) -> None:
        counts, wide = pair_counts(rewards, labels), rewards.double()
        self._sums[:5] += torch.stack(
            [
                losses.double().sum(),
                counts.num_correct,
                counts.sum_margin,
                counts.num_pairs,
                wide.sum(),
            ]
        )
        self._sums[5:8] += self._sums.new_tensor([len(wide), rows, padded])
        self._highest[:2] = torch.maximum(self._highest[:2], torch.stack([wide.max(), -wide.min()]))

    @torch.no_grad()
    def add_router_loss(self, loss: Tensor) -> None:
        self._sums[8] += loss.double()

    def reduced(self) -> dict[str, float]:
        """The sums of all workers by name, and min_raw_score, max_raw_score and memory_mb."""
        self._highest[2] = _peak_memory_mb(self._sums.device)
        dist.all_reduce(self._sums)
        dist.all_reduce(self._highest, op=dist.ReduceOp.MAX)
        highest, negative_lowest, memory_mb = self._highest.tolist()
        return {
            **dict(zip(_SUMS, self._sums.tolist(), strict=True)),
            "min_raw_score": -negative_lowest,
            "max_raw_score": highest,
            "memory_mb": memory_mb,
        }


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # Linux: KiB
