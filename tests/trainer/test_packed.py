"""Packed passes: the losses and the gradients of one row a sequence, for every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCAB_SIZE, make_network
from torch import Tensor

from reward_actor.engine.packing import ForestPacking, Packing, PaddedPacking
from reward_actor.model.reward_model import RewardModel
from trainer.config.config_file import load_config
from trainer.data.comparisons import Comparison, Comparisons
from trainer.loss import Labels, comparison_losses, router_loss
from trainer.network.packed import PackedForward, TrainedModel, row_weights, sequences_of

PACKED = [family for family in FAMILIES if family not in ("gemma2", "bloom")]
LOSS = load_config(None, [("data.train", "x")]).loss
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 16,
        "long_factor": [4.0] * 16,
        "original_max_position_embeddings": 32,
    },
    "original_max_position_embeddings": 32,
}


def comparisons(seed: int = 0, longest: int = 40) -> Comparisons:
    """Pairs and rankings of several levels; two comparisons share a prompt."""
    draw = np.random.Generator(np.random.PCG64(seed))

    def some(low: int, high: int) -> list[int]:
        return draw.integers(5, VOCAB_SIZE, draw.integers(low, high)).tolist()

    prompts = [some(3, longest), some(20, longest + 1)]
    items = []
    for number, k in enumerate((2, 2, 4, 2)):
        prompt = prompts[number % 2]
        sequences = [prompt + some(1, 12) for _ in range(k)]
        sequences[1] = sequences[0][:-1] + some(1, 5)
        items.append(Comparison(sequences, [float(-i) for i in range(k)], str(number)))
    return Comparisons.of(items, ["data"])


class InOnePass:
    """A network whose forward are called as an engine's are, in this process."""

    def __init__(self, family: str, **more: object) -> None:
        self.module = TrainedModel(RewardModel(make_network(family, **more)))
        self.device = torch.device("cpu")

    def __call__(self, batches: object, hidden: bool = False) -> Tensor:
        output: Tensor = self.module(batches, hidden=hidden)
        return output


def gradients(
    engine: InOnePass, path: Packing, data: Comparisons
) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradient of every parameter, with the routers' loss where there are any."""
    model = engine.module
    model.zero_grad()
    sequences = [data.sequence(i) for i in range(data.num_sequences)]
    (batch,) = path.plan(sequences, 10**6)
    outputs = model([batch])
    labels = Labels.of(data, range(len(data)), "cpu")
    loss = comparison_losses(outputs, labels, LOSS, has_ties=False).losses.sum()
    if model.routers.found:
        weights = torch.from_numpy(row_weights([batch], len(sequences)))
        loss = loss + 0.1 * router_loss(model.routers.logits, model.routers.top_k, weights)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found


@pytest.mark.parametrize("family", PACKED)
def test_the_gradients_are_those_of_the_padded_path(family: str) -> None:
    engine = InOnePass(family)
    data = comparisons()
    packed_loss, packed = gradients(engine, ForestPacking(engine.module.model), data)
    padded_loss, padded = gradients(engine, PaddedPacking(engine.module.model), data)
    assert packed_loss == pytest.approx(padded_loss, rel=1e-5)
    assert packed.keys() == padded.keys()
    # Some are zero but for rounding: a bias before the head moves all rewards alike.
    least = 1e-2 * max(float(gradient.norm()) for gradient in padded.values())
    for name, gradient in padded.items():
        apart = (packed[name] - gradient).norm() / gradient.norm().clamp(min=least)
        assert float(apart) < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_what_cannot_be_packed_is_padded_by_itself(family: str) -> None:
    forward = PackedForward(InOnePass(family), "auto")  # type: ignore[arg-type]
    assert forward.packed is (family in PACKED)
    data = comparisons(seed=3)
    sequences = [data.sequence(i) for i in range(data.num_sequences)]
    with torch.no_grad():
        together = forward.run(forward.plan(sequences), len(sequences))
        alone = torch.cat([forward.run(forward.plan([s]), 1) for s in sequences])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


def test_packing_that_is_asked_for_and_wrong_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training\.packing: this network cannot be packed"):
        PackedForward(InOnePass("bloom"), "forest")  # type: ignore[arg-type]


def test_a_pass_without_sequences_moves_nothing() -> None:
    """It only keeps step with the other workers: no output, and gradients of zero."""
    engine = InOnePass("llama")
    forward = PackedForward(engine, "auto")  # type: ignore[arg-type]
    outputs = forward.run(forward.plan([]), 0)
    assert outputs.shape == (0,)
    (outputs.sum() + 0.0).backward()
    found = [p.grad for p in engine.module.parameters() if p.grad is not None]
    assert found
    assert all(float(gradient.abs().max()) == 0 for gradient in found)


def test_sequences_on_both_sides_of_a_rope_border_make_two_batches_in_every_pass() -> None:
    engine = InOnePass("phi3", **LONGROPE)
    forward = PackedForward(engine, "auto")  # type: ignore[arg-type]
    assert forward.packed
    sequences = [[7] * 10, [7] * 40, [7] * 20 + [8], [7] * 40 + [9]]
    for some in (sequences, sequences[:1], []):
        assert len(forward.plan(some)) == 2
    with torch.no_grad():
        together = forward.run(forward.plan(sequences), 4)
        alone = torch.cat([forward.run(forward.plan([s]), 1) for s in sequences])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


def test_a_row_weighs_as_much_as_the_sequences_that_share_it() -> None:
    model = TrainedModel(RewardModel(make_network("llama"))).model
    sequences = [[1, 2, 3, 4], [1, 2, 5], [1, 2], [6]]
    (packed,) = ForestPacking(model).plan(sequences, 100)
    weights = dict(zip(packed.forest.token_ids.tolist(), row_weights([packed], 4), strict=True))
    assert weights == {1: 3, 2: 3, 3: 1, 4: 1, 5: 1, 6: 1}
    (padded,) = PaddedPacking(model).plan(sequences, 100)
    assert row_weights([padded], 4).reshape(4, 4).sum() == 10


def test_a_gradient_that_is_not_finite_names_its_sequences() -> None:
    engine = InOnePass("llama")
    model = engine.module
    sequences = [[10, 11, 12], [10, 11, 13], [20, 21], [30]]
    (batch,) = ForestPacking(model.model).plan(sequences, 100)
    outputs = model([batch])
    outputs.backward(torch.tensor([0.0, 0.0, float("inf"), 1.0]))
    bad = model.bad_rows()
    assert bad is not None
    assert sequences_of([batch], bad) == [2]
    with torch.no_grad():
        model([batch])
    assert model.bad_rows() is None


def test_it_names_them_in_a_pass_of_several_batches() -> None:
    engine = InOnePass("phi3", **LONGROPE)
    forward = PackedForward(engine, "auto")  # type: ignore[arg-type]
    sequences = [[7] * 10, [8] * 40, [9] * 12]
    batches = forward.plan(sequences)
    assert len(batches) == 2
    for number in range(3):
        gradient = torch.zeros(3)
        gradient[number] = float("inf")
        forward.run(batches, 3).backward(gradient)
        bad = engine.module.bad_rows()
        assert bad is not None
        assert sequences_of(batches, bad) == [number]
