"""Trains a sampling policy: plain next-token training of a base model on prompts and completions.

    python examples/train_policy.py BASE_DIR CORPUS OUT_DIR [--steps 250] [--seed 0]

CORPUS is a .jsonl file of {"prompt", "completion"} rows. The number of steps is fixed, so equal
arguments give an equal policy. Left out on purpose: evaluation, checkpoints, packing, several
workers. It is only there to have something to sample from and to improve with a reward.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_actor.files import read_rows
from trainer.init_model import copy_tokenizer

if TYPE_CHECKING:
    import torch

    Example = tuple[list[int], int]  # token ids of prompt and completion, length of the prompt

IGNORED = -100  # the label that torch's cross entropy leaves out


def read_examples(corpus: Path, tokenizer: Any, max_length: int) -> list[Example]:
    """One (token ids, prompt length) per row; ids end at the turn-end token.

    Raises ValueError, naming the file, for a missing or empty file, a row without both strings and
    a row of more than `max_length` tokens.
    """
    if not corpus.is_file():
        raise ValueError(f"corpus: {corpus} is not a file; examples/preferences.py writes one")
    examples = []
    for place, row in read_rows(corpus):
        if not {"prompt", "completion"} <= row.keys():
            raise ValueError(f'corpus: {place} is not a {{"prompt", "completion"}} row')
        prompt, completion = row["prompt"], row["completion"]
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        prompt_ids = tokenizer(rendered)["input_ids"]
        ids = prompt_ids + tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id]
        if len(ids) > max_length:
            raise ValueError(f"corpus: {place} has {len(ids)} tokens, above {max_length}")
        examples.append((ids, len(prompt_ids)))
    return examples


def make_batch(examples: list[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors (B, T); labels keep only the completion and its turn-end token."""
    import torch

    width = max(len(ids) for ids, _ in examples)
    batch = {
        "input_ids": torch.full((len(examples), width), pad_token_id),
        "attention_mask": torch.zeros(len(examples), width, dtype=torch.long),
        "labels": torch.full((len(examples), width), IGNORED),
    }
    for row, (ids, num_prompt) in enumerate(examples):
        batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, num_prompt : len(ids)] = torch.tensor(ids[num_prompt:])
    return batch


def train_policy(
    base_dir: Path,
    corpus: Path,
    out_dir: Path,
    *,
    num_steps: int = 250,
    batch_size: int = 32,
    learning_rate: float = 4e-3,
    seed: int = 0,
) -> Path:
    """Trains for `num_steps` and saves model and tokenizer to `out_dir`, which it returns.

    Raises ValueError for a corpus it cannot use and for fewer than one step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: {num_steps} is below 1")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    model = AutoModelForCausalLM.from_pretrained(base_dir, use_safetensors=True)
    model.train()
    examples = read_examples(corpus, tokenizer, model.config.max_position_embeddings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    num_warmup = max(1, num_steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / num_warmup, (num_steps - step) / num_steps),
    )
    rng = random.Random(seed)
    with progress(num_steps) as advance:
        for _ in range(num_steps):
            chosen = rng.sample(examples, min(batch_size, len(examples)))
            loss = model(**make_batch(chosen, tokenizer.pad_token_id), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            advance(float(loss.detach()))

    model.save_pretrained(out_dir)
    copy_tokenizer(base_dir, out_dir)  # policy and reward model share one, to the byte
    return out_dir


@contextmanager
def progress(num_steps: int) -> Iterator[Callable[[float], None]]:
    """Yields a function to call with each step's loss: one live line, or a few plain ones."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console()
    if console.is_terminal:
        columns = (
            TextColumn("policy"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("policy", total=num_steps, loss=float("nan"))
            yield lambda loss: bar.update(task, advance=1, loss=loss)
        return

    started_s = time.monotonic()
    done = 0

    def report(loss: float) -> None:
        nonlocal done
        done += 1
        if done % max(1, num_steps // 10) == 0 or done == num_steps:
            eta_s = (time.monotonic() - started_s) / done * (num_steps - done)
            print(f"step {done}/{num_steps}  loss {loss:.3f}  ETA {eta_s:.0f} s", flush=True)

    yield report


def main() -> None:
    """Reads the command line, trains and prints where the policy lies."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base_dir", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import torch
    from transformers.utils import logging

    # So small a model gains nothing from a second thread and loses a lot on a busy machine; and one
    # thread adds up in one order, which is what makes the result repeat.
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # Saving a network imports DeepSpeed, which says that this machine has no GPU.
    getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= ERROR)
    started_s = time.monotonic()
    try:
        train_policy(args.base_dir, args.corpus, args.out_dir, num_steps=args.steps, seed=args.seed)
    except ValueError as error:
        parser.error(str(error))
    print(f"policy: {args.out_dir} ({time.monotonic() - started_s:.0f} s)")


if __name__ == "__main__":
    main()
