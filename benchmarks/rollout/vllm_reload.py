"""A child with a plain vLLM engine, asked to load other weights: what an update costs at least."""

from __future__ import annotations

import time

from benchmarks.common.channel import Answer, Message, serve


def load(order: Message) -> tuple[Message, Answer]:
    """order: model, and max_model_len of `vllm.LLM`."""
    from vllm import LLM

    engine = LLM(
        model=order["model"],
        max_model_len=order["max_model_len"],
        dtype="float32",
        enforce_eager=True,
        disable_log_stats=True,
    )

    def answer(message: Message) -> Message:
        """Seconds that it takes to load the weights of a directory."""
        begin = time.perf_counter()
        engine.collective_rpc("reload_weights", kwargs={"weights_path": message["directory"]})
        return {"seconds": time.perf_counter() - begin}

    return {}, answer


if __name__ == "__main__":
    serve(load)
