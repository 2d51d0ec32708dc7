"""`VllmScorer`: a reward model in vLLM's engine, held to the same contract as `RewardScorer`.

For models that need several GPUs. Legend: n sequences, K heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reward_actor.contract import CONTRACT_FILE, ScoringContract
from reward_actor.golden import replay
from reward_actor.model.directory import CheckpointError
from reward_actor.model.ensemble import Ensemble
from reward_actor.model.layouts import recognise
from reward_actor.model.load import Opened, open_directory
from reward_actor.readout import Readout
from reward_actor.render import Renderer
from reward_actor.vllm.engine import VllmEngine

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Scores = NDArray[np.float32]

# Handed to the engine at once, in forward passes, so that it never waits for the next batch.
_PASSES_AT_ONCE = 4


class VllmScorer:
    """One loaded reward model. Gives the raw scores that `RewardScorer` gives, under the same
    model_version.
    """

    path = "vllm"
    fallback_reason: str | None = None
    num_cache_misses: int | None = None

    def __init__(self, opened: Opened, engine: VllmEngine) -> None:
        self.contract: ScoringContract = opened.contract
        self.readout = Readout.of(opened.contract)
        self.renderer = Renderer(opened.tokenizer, opened.contract)
        self.model_version = opened.version()
        self.dtype = opened.dtype
        self.tokenizer_path = opened.layout.directory.resolve()
        self._engine = engine

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str = "auto",
        tensor_parallel: int = 1,
        gpu_memory_utilization: float = 0.9,
        max_batch_tokens: int | None = None,
        trust_remote_code: bool = False,
    ) -> VllmScorer:
        """Load a reward model into an engine of its own and replay its golden samples through it.

        dtype: "auto" (the contract's), "float32", "bfloat16", "float16"; tensor_parallel: GPUs of
        this machine that share the model; gpu_memory_utilization: of each of them, not used on a
        CPU; max_batch_tokens: of one forward pass, vLLM's choice when not given; trust_remote_code:
        for a tokenizer's own code, none of the network's is run. Raises CheckpointError,
        ContractError and ValueError, for what `RewardScorer` refuses, for what `check_supported`
        does, and for a model that vLLM does not take.
        """
        directory = Path(path).expanduser()
        check_supported(directory)
        opened = open_directory(directory, dtype=dtype, trust_remote_code=trust_remote_code)
        engine = VllmEngine(
            directory,
            dtype=opened.dtype,
            max_length=opened.contract.max_length,
            tensor_parallel=tensor_parallel,
            gpu_memory_utilization=gpu_memory_utilization,
            max_batch_tokens=max_batch_tokens,
        )
        try:
            scorer = cls(opened, engine)
            scorer._replay()
        except BaseException:
            engine.close()
            raise
        return scorer

    @property
    def max_batch_tokens(self) -> int:
        """Tokens that the engine is given at once."""
        return _PASSES_AT_ONCE * self._engine.max_batch_tokens

    def plan(self, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
        """The sequences as vLLM takes them."""
        return [np.asarray(sequence).tolist() for sequence in sequences]

    def raw_scores(
        self, sequences: Sequence[Sequence[int]], plan: list[list[int]] | None = None
    ) -> Scores:
        """What the heads say of sequences that `Renderer.checked` has passed: (n, K) float32.

        Raises EngineDied and RuntimeError, as `VllmEngine.pooled` does.
        """
        rows = self._engine.pooled(plan or self.plan(sequences), "classify")
        return np.array(rows, np.float32).reshape(len(sequences), len(self.readout))

    def token_scores(
        self, sequences: Sequence[Sequence[int]], plan: list[list[int]] | None = None
    ) -> list[Scores]:
        """What the heads say at every token of such sequences: n arrays (tokens, K).

        Raises as `raw_scores` does. The prefix cache gives states of the last token only, so that
        every token is computed.
        """
        return self._engine.pooled(plan or self.plan(sequences), "token_classify")

    def check(self) -> None:
        """Raises EngineDied if the engine's processes are not there any more."""
        self._engine.check()

    def offload(self) -> bool:
        """Move the weights to host memory until `restore`; False where vLLM cannot, on a CPU."""
        return self._engine.offload()

    def restore(self) -> None:
        """Score again. Raises RuntimeError if the device has no room, and ContractError unless the
        golden samples are reproduced."""
        self._engine.restore()
        self._replay()

    def _replay(self) -> None:
        replay(self.renderer, self.dtype, self.raw_scores, "the vllm engine")

    def close(self) -> None:
        """End the engine's processes."""
        self._engine.close()


def check_supported(directory: Path) -> None:
    """Raise ValueError for what the engine forest serves and this one does not."""
    if Ensemble.load(directory) is not None:
        raise ValueError(
            f"{directory} is an ensemble, and engine vllm serves one model; use engine forest, or "
            "one of its members"
        )
    layout = recognise(directory)
    if layout.kind != "hf":
        raise CheckpointError(
            f"{directory} is a model of the layout {layout.kind!r}, which vLLM does not load. "
            f"Convert it first: rayward convert {directory} DST; or use engine forest"
        )
    if len(layout.head.layers) > 1:
        raise CheckpointError(
            f"{directory} has a head of {len(layout.head.layers)} layers, which engine vllm does "
            "not load; use engine forest"
        )
    contract = ScoringContract.load(directory)
    if contract is None or not contract.golden.samples:
        missing = CONTRACT_FILE if contract is None else "golden samples in its contract"
        raise CheckpointError(
            f"{directory} has no {missing}, so nothing tells whether vLLM gives its rewards. "
            f"Convert it first: rayward convert {directory} DST; or use engine forest"
        )
