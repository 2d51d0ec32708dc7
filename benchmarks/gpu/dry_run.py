"""The GPU's paths on tensors without memory: no device and no driver, only CUDA's build of torch.

    python -m benchmarks.gpu --dry-run          # `make check-cuda` installs that torch for it

Under torch's FakeTensorMode every operator checks devices, dtypes, shapes and arguments and gives a
tensor that says what would be there. So a wrong one shows here, and the peak of the memory is known
from the tensors that live at once; what a kernel takes for itself and fragmentation are not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# As of torch 2.13 there is no public name for any of these; tests/benchmarks/test_gpu.py uses them.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common.report import aligned
from benchmarks.common.shapes import SHAPES, empty_network
from benchmarks.training.engines import torch_engine
from reward_actor.engine.decoder import Decoder
from reward_actor.engine.memory import CONTEXT_BYTES, budget_within
from reward_actor.engine.packing import Batch, ForestPacking, Packing, PaddedPacking
from reward_actor.model.reward_model import RewardModel
from trainer.loss import bradley_terry

NAMES = ("0.6b", "1b", "8b")
GROUP_SIZE, PROMPT_TOKENS, COMPLETION_TOKENS = 8, 1024, 512
DEVICES_GB = (24, 48, 80, 141)
_GIB = 2.0**30


@dataclass
class Outcome:
    """What one path did. peak_bytes: of its tensors beside the weights. num_rows: of its batch."""

    path: str
    num_rows: int = 0
    peak_bytes: int = 0
    fault: str | None = None

    @property
    def bytes_per_row(self) -> float:
        return self.peak_bytes / max(1, self.num_rows)


# Operators of which a fake tensor does not say what a kernel would.
_STRICT = ("_varlen_attn", "linear", "matmul", "mm", "addmm", "addmm_", "bmm")


class Watch(TorchDispatchMode):
    """The most bytes that lived at once in a device's storages, of those that operators have made.

    Raises TypeError for a product or an attention over several devices or dtypes.
    """

    supports_higher_order_operators = True  # FlexAttention is one

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self._device = device
        self.peak = self._live = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given: list[Tensor] = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if getattr(func, "overloadpacket", func).__name__ in _STRICT:
            kinds = (
                {str(t.device) for t in given},
                {t.dtype for t in given if t.is_floating_point()},
            )
            if any(len(kind) > 1 for kind in kinds):
                raise TypeError(f"{func} gets {' and '.join(map(str, kinds))}")
        # What goes in was there before; a view that comes out has its storage.
        for tensor in self._on_device(given):
            self._known.setdefault(tensor.untyped_storage(), 0)
        # Under inference_mode `to` comes whole; that of a constant torch 2.13 would do for real.
        run = func.decompose if getattr(func, "overloadpacket", None) is torch.ops.aten.to else func
        output = run(*args, **(kwargs or {}))
        for tensor in self._on_device(tree_leaves(output)):
            storage = tensor.untyped_storage()
            if storage not in self._known:
                size = storage.nbytes()
                self._known[storage] = size
                self._live += size
                weakref.finalize(storage, self._free, size)
        self.peak = max(self.peak, self._live)
        return output

    def _on_device(self, values: Sequence[Any]) -> list[Tensor]:
        return [t for t in values if isinstance(t, Tensor) and t.device.type == self._device]

    def _free(self, size: int) -> None:
        self._live -= size


def dry_run(names: Sequence[str] = NAMES) -> dict[str, Any]:
    """Run every path of these shapes; what failed is in `fault`."""
    torch.compiler.set_stance("force_eager")  # the compiler would look for a device
    return {name: _shape(name) for name in names}


def _shape(name: str) -> dict[str, Any]:
    prompt = [7] * PROMPT_TOKENS
    sequences = [prompt + [11 + i] * COMPLETION_TOKENS for i in range(GROUP_SIZE)]
    with FakeTensorMode():
        model = RewardModel(empty_network(SHAPES[name], torch.bfloat16, "cuda"))
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        paths: list[Packing] = [
            ForestPacking(model, Decoder(model.backbone, compiled=True)),
            ForestPacking(model, Decoder(model.backbone)),
            ForestPacking(model),
            ForestPacking(model, Decoder(model.backbone), "flex"),
            PaddedPacking(model),
        ]
        scoring = [
            _tried(path.name, path, sequences, lambda batch: model.head(batch.pooled()))
            for path in paths
        ]
        every_token = _tried(
            "every token", paths[0], sequences, lambda batch: batch.every_token()[0]
        )
        training = [_trained(name, sequences, lora) for lora in (0, 16)]
    best = scoring[0]
    return {
        "weights_bytes": weights,
        "scoring": [vars(outcome) for outcome in [*scoring, every_token]],
        "training": [vars(outcome) for outcome in training],
        "budgets": {gb: _budgets(gb * 1e9 - weights, best, model) for gb in DEVICES_GB},
    }


def _budgets(free: float, outcome: Outcome, model: RewardModel) -> dict[str, int] | None:
    """Rows of a batch: the most that fit by the tensors above, and what a scorer takes. None where
    the weights alone leave no room, or the path has failed."""
    free -= CONTEXT_BYTES
    if free <= 0 or outcome.fault is not None:
        return None
    return {
        "largest": int(free / outcome.bytes_per_row),
        "default": budget_within(free, model, "cuda"),
    }


def _tried(
    name: str, path: Packing, sequences: list[list[int]], run: Callable[[Batch], Tensor]
) -> Outcome:
    outcome = Outcome(name)
    try:
        with torch.inference_mode(), Watch() as memory:
            (batch,) = path.plan(sequences, 2**31)
            outcome.num_rows = batch.num_rows
            assert run(batch).device.type == "cuda"
        outcome.peak_bytes = memory.peak
    except Exception as error:  # whatever it is: it is what a GPU would have said
        outcome.fault = f"{type(error).__name__}: {error}".splitlines()[0]
    return outcome


def _trained(name: str, sequences: list[list[int]], lora_rank: int) -> Outcome:
    """The forward pass of one packed micro-batch, which keeps what the backward pass reads. That
    one asks for a driver, whatever its tensors are."""
    what = f"adapters of rank {lora_rank}" if lora_rank else "all weights"
    outcome = Outcome(f"training, {what}")
    try:
        engine = torch_engine(empty_network(SHAPES[name], torch.bfloat16, "cuda"), lora_rank)
        batches = ForestPacking(engine.module.model).plan(sequences, 2**31)
        outcome.num_rows = sum(batch.num_rows for batch in batches)
        with Watch() as memory:
            rewards = engine(batches)
            loss = bradley_terry(rewards[0::2], rewards[1::2]).sum()
            assert loss.requires_grad
        outcome.peak_bytes = memory.peak
    except Exception as error:  # as above
        outcome.fault = f"{type(error).__name__}: {error}".splitlines()[0]
    return outcome


def faults(result: dict[str, Any]) -> list[str]:
    """What is wrong with a shape: paths that failed, and budgets beyond the memory."""
    outcomes = [Outcome(**each) for each in result["scoring"] + result["training"]]
    failed = [f"{outcome.path}: {outcome.fault}" for outcome in outcomes if outcome.fault]
    beyond = [
        f"on {gb} GB a scorer takes {found['default']:,} rows, and {found['largest']:,} fit"
        for gb, found in result["budgets"].items()
        if found is not None and found["default"] > found["largest"]
    ]
    return failed + beyond


def tables(results: dict[str, Any]) -> str:
    """What passed, the memory that it takes, and the budgets."""
    what = f"{GROUP_SIZE} completions of {COMPLETION_TOKENS} on a prompt of {PROMPT_TOKENS}"
    rows = [["shape", "path", "rows", "peak GiB", "KiB a row", "passed"]]
    for name, result in results.items():
        for outcome in (Outcome(**each) for each in result["scoring"] + result["training"]):
            rows.append(
                [
                    name,
                    outcome.path,
                    f"{outcome.num_rows:,}",
                    f"{outcome.peak_bytes / _GIB:.2f}",
                    f"{outcome.bytes_per_row / 1024:.0f}",
                    "no" if outcome.fault else "yes",
                ]
            )
    sizes = [["shape", "weights GiB", *(f"on {gb} GB: most (default)" for gb in DEVICES_GB)]]
    for name, result in results.items():
        cells = [
            "none" if found is None else f"{found['largest']:,} ({found['default']:,})"
            for found in result["budgets"].values()
        ]
        sizes.append([name, f"{result['weights_bytes'] / _GIB:.1f}", *cells])
    return "\n".join(
        [
            f"bfloat16, one batch: {what}",
            aligned(rows),
            *(f"{name}, {fault}" for name, result in results.items() for fault in faults(result)),
            "",
            "rows in one batch, beside the weights:",
            aligned(sizes),
        ]
    )
