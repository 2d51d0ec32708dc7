"""A child that looks at the machine: which device and dtype, and how fast it multiplies matrices.

The rate is measured again in every round, beside the peers that are judged by it.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

from benchmarks.common import machine
from benchmarks.common.channel import Answer, Message, serve
from benchmarks.common.shapes import SHAPES, build_network, save_network

# (M, K, N): a product as the 79M shape has it for 4096 tokens, smaller where a shape's own are, and
# one that fills a GPU.
_CPU_PRODUCT = (4096, 768, 2048)
_CUDA_PRODUCT = (8192, 8192, 8192)
_NUM_WARM_UP = 3
_MIN_REPEATS = 15
_MIN_SECONDS = 1.0


def load(order: Message) -> tuple[Message, Answer]:
    """order: shape, dtype, device, threads; "auto" is decided here and told in the reply."""
    torch.set_num_threads(order["threads"])
    device = order["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype_name = order["dtype"]
    if dtype_name == "auto":
        dtype_name = "bfloat16" if _multiplies_bfloat16(device) else "float32"
    dtype = getattr(torch, dtype_name)

    def answer(message: Message) -> Message:
        if "save" in message:
            network = build_network(SHAPES[order["shape"]], dtype, device)
            save_network(network, Path(message["save"]))
            return {}
        rows, inner, columns = _CPU_PRODUCT
        shape = SHAPES[order["shape"]]
        product = (rows, min(inner, shape.hidden_size), min(columns, shape.intermediate_size))
        products = [product] if device == "cpu" else [product, _CUDA_PRODUCT]
        return {
            "x".join(map(str, product)): matmul_rate(product, dtype, device) for product in products
        }

    described = machine.describe_cpu()
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = properties.name
        described["gpu_memory_bytes"] = properties.total_memory
    ready = {
        "device": device,
        "dtype": dtype_name,
        "machine": described,
        "versions": machine.versions(),
    }
    return ready, answer


def matmul_rate(product: tuple[int, int, int], dtype: torch.dtype, device: str) -> float:
    """Floating-point operations a second of one (M, K) x (K, N) product: the median of many."""
    rows, inner, columns = product
    left = torch.randn(rows, inner, dtype=dtype, device=device)
    weight = torch.randn(columns, inner, dtype=dtype, device=device)
    seconds: list[float] = []
    with torch.inference_mode():
        begin = time.perf_counter()
        while len(seconds) < _NUM_WARM_UP + _MIN_REPEATS or (
            time.perf_counter() - begin < _MIN_SECONDS
        ):
            start = time.perf_counter()
            torch.nn.functional.linear(left, weight)
            if device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return 2.0 * rows * inner * columns / statistics.median(seconds[_NUM_WARM_UP:])


def _multiplies_bfloat16(device: str) -> bool:
    if device == "cpu":
        return machine.has_native_bfloat16()
    return torch.cuda.get_device_capability(device) >= (8, 0)


if __name__ == "__main__":
    serve(load)
