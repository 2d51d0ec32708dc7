"""What is mixed into vLLM's worker, in whose process a policy's weights are."""

from __future__ import annotations

from typing import Any


class PolicyWorker:
    """`AsyncEngineArgs.worker_extension_cls`."""

    model_runner: Any
    reload_weights: Any

    def reload_policy(self, directory: str) -> None:
        """Load other weights in place.

        An output head that is tied to the embedding has no weights in a checkpoint, so vLLM 0.32
        leaves it as it was; on a CPU that is a packed copy of the old embedding.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        self.reload_weights(weights_path=directory)
        model = self.model_runner.get_model()
        if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
            for layer in model.modules():
                if isinstance(layer, ParallelLMHead):
                    layer.quant_method.process_weights_after_loading(layer)
