"""What a run of rollouts comes to, while it runs and at its end."""

from __future__ import annotations

import time
from statistics import pstdev

from reward_actor.files import Row

_NUM_BINS = 10
_WIDTH = 40


class Summary:
    """Of rows as `reward_actor.rollout.rows` writes them."""

    def __init__(self) -> None:
        self._num_prompts = 0
        self.num_unsampled = 0
        self._num_completions = 0
        self._num_cut = 0
        self._rewards: list[float] = []
        self._total_reward = 0.0
        self._total_spread = 0.0  # of the rewards within a prompt, which
        self._num_spreads = 0  # so many have
        self._model_versions: dict[str, None] = {}
        self._is_scored = False
        self._num_sampled_tokens = 0
        self._num_scored_tokens = 0
        self._began = self._last = 0.0

    def begin(self) -> None:
        """Rows that are added from now on count for the speed."""
        self._began = self._last = time.perf_counter()

    def add(self, row: Row) -> None:
        self._num_prompts += 1
        lengths = row["num_completion_tokens"]
        self.num_unsampled += not lengths
        self._num_completions += len(lengths)
        self._num_cut += row["finish_reasons"].count("length")
        rewards = [reward for reward in row.get("rewards", ()) if reward is not None]
        self._is_scored |= "rewards" in row
        self._rewards += rewards
        self._total_reward += sum(rewards)
        if len(rewards) > 1:
            self._total_spread += pstdev(rewards)
            self._num_spreads += 1
        if version := row.get("model_version"):  # "" where no model was asked
            self._model_versions[version] = None
        if self._began:
            self._last = time.perf_counter()
            self._num_sampled_tokens += sum(lengths)
            self._num_scored_tokens += sum(row.get("num_tokens", ()))

    def line(self) -> str:
        """For a line that changes while it runs."""
        return f"{self._reward('')}{self._shares()}, {self._speed()}"

    def text(self) -> list[str]:
        """Lines for the end."""
        lines = []
        if self._rewards:
            lines = [self._reward(f", standard deviation {pstdev(self._rewards):.4f}").rstrip(", ")]
            lines += [f"  {line}" for line in histogram(self._rewards)]
        shares = f"completions: {self._shares()}"
        if self.num_unsampled:
            shares += f", {self.num_unsampled} of {self._num_prompts} prompts not sampled"
        lines.append(shares)
        if len(self._model_versions) > 1:
            lines.append(f"rewards are of different models: {', '.join(self._model_versions)}")
        if self._began:  # else there was nothing left to sample
            lines.append(self._speed())
        return lines

    def _reward(self, spread: str) -> str:
        if not self._rewards:
            return ""
        mean = self._total_reward / len(self._rewards)
        within = ""
        if self._num_spreads:
            within = f", {self._total_spread / self._num_spreads:.4f} within a prompt"
        return f"reward: mean {mean:+.4f}{spread}{within}, "

    def _shares(self) -> str:
        cut = f"{self._share(self._num_cut)} cut by length"
        if not self._is_scored:
            return cut
        return f"{cut}, {self._share(self._num_completions - len(self._rewards))} without a reward"

    def _share(self, count: int) -> str:
        return f"{count / max(1, self._num_completions):.1%}"

    def _speed(self) -> str:
        seconds = max(1e-9, self._last - self._began)
        sampled = f"{self._num_sampled_tokens / seconds:,.0f} tokens/s sampled"
        if not self._is_scored:
            return sampled
        return f"{sampled}, {self._num_scored_tokens / seconds:,.0f} scored"


def histogram(values: list[float]) -> list[str]:
    """A line for each of ten equal parts of their range: where it begins, a bar, how many."""
    low, high = min(values), max(values)
    width = (high - low) / _NUM_BINS
    if not width:
        return [f"{low:+8.3f} {'#' * _WIDTH} {len(values)}"]
    counts = [0] * _NUM_BINS
    for value in values:
        counts[min(_NUM_BINS - 1, int((value - low) / width))] += 1
    longest = max(counts)
    return [
        f"{low + place * width:+8.3f} {'#' * round(_WIDTH * count / longest):<{_WIDTH}} {count}"
        for place, count in enumerate(counts)
    ]
