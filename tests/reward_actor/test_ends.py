"""Where other systems' sequences end: their own formula, by every way that leads to a reward."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_systems import CHAT_SYSTEMS, letters_tokenizer
from families import make_network
from transformers import AutoModelForSequenceClassification

from reward_actor import Group, RewardScorer, Whole
from reward_actor.contract import ScoringContract
from reward_actor.convert import convert
from reward_actor.explain import explain
from reward_actor.model.load import open_directory
from reward_actor.render import Renderer
from trainer.evaluation.evaluate import evaluate_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has no scoring_contract.json:UserWarning"),
    pytest.mark.filterwarnings("ignore:not settled by:UserWarning"),
    pytest.mark.filterwarnings("ignore:the chat template of .* writes today's date:UserWarning"),
]

USER = [{"role": "user", "content": "Name two fruits."}]
ANSWER = "Apples and pears."
QUESTION = "Question: name two fruits. Answer: "
# With a number of its own each, at 1e-5; all the others have the same token ids.
SCORED = ("llama 3.1, pad is the turn's end", "qwen 2.5", "gemma 2", "phi 3, pad is EOS")


def saved(directory: Path, tokenizer: Any, **settings: Any) -> Path:
    """A random Llama and a tokenizer, as plain `transformers` saves them."""
    network = make_network(
        "llama",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=2048,  # one template has a system prompt of 1,500 letters
    )
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **settings}))
    return directory


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def templated(tokenizer: Any, answer: str = ANSWER) -> str:
    turns = [*USER, {"role": "assistant", "content": answer}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def read_by_transformers(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """`ids` up to the one whose score `transformers` returns: the last that is no pad."""
    return list(ids[: max(i for i, token in enumerate(ids) if token != tokenizer.pad_token_id) + 1])


def logit(directory: Path, ids: list[int]) -> float:
    network = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        row = torch.tensor([ids])
        return network(input_ids=row, attention_mask=torch.ones_like(row)).logits.item()


def at_last(directory: Path, ids: list[int]) -> float:
    """What a `score` head says at the last of these ids, whatever it is."""
    network = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, num_labels=1
    )
    with torch.inference_mode():
        hidden = network.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return network.score(hidden).item()


def renderer_of(directory: Path) -> Renderer:
    opened = open_directory(directory)
    return Renderer(opened.tokenizer, opened.contract)


def reward(model: RewardScorer, prompt: Any = USER, completion: str = ANSWER) -> float:
    (scores,) = model.score([Group(prompt, [completion])])
    assert scores.errors == [None]
    return float(scores.rewards[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CHAT_SYSTEMS)
def test_a_conversation_has_the_ids_of_its_whole_template(name: str, tmp_path: Path) -> None:
    tokenizer = letters_tokenizer(CHAT_SYSTEMS[name])
    directory = saved(tmp_path / "model", tokenizer)
    whole = encode(tokenizer, templated(tokenizer))
    expected = read_by_transformers(tokenizer, whole)
    render = renderer_of(directory)
    assert render.render(USER, ANSWER) == expected
    texts, ids = Whole(texts=[templated(tokenizer)]), Whole(ids=[whole])
    assert render.sequences(texts) == render.sequences(ids) == [expected]
    # What a policy sampled: with the token that ends its turn, and cut by its length.
    prompt_ids = render.prompt_ids(USER)
    if whole[: len(prompt_ids)] == prompt_ids:
        said = encode(tokenizer, ANSWER)
        if whole[len(prompt_ids) :][: len(said)] == said:
            stopped = [*said, *whole[len(prompt_ids) + len(said) :][:1]]
            sampled = Group(prompt_ids=prompt_ids, completion_ids=[said, stopped])
            assert render.sequences(sampled) == [expected, expected]


@pytest.mark.parametrize("name", SCORED)
def test_a_conversation_is_scored_as_transformers_does(name: str, tmp_path: Path) -> None:
    tokenizer = letters_tokenizer(CHAT_SYSTEMS[name])
    directory = saved(tmp_path / "model", tokenizer)
    expected = logit(directory, encode(tokenizer, templated(tokenizer)))
    scorer = RewardScorer.from_pretrained(directory, "cpu")
    assert reward(scorer) == pytest.approx(expected, abs=1e-5)
    whole = scorer.score([Whole(texts=[templated(tokenizer)])])  # type: ignore[list-item]
    assert whole[0].rewards[0] == pytest.approx(expected, abs=1e-5)
    pair = {"prompt": USER, "chosen": ANSWER, "rejected": "No."}
    (tmp_path / "pair.jsonl").write_text(json.dumps(pair))
    evaluated = evaluate_model(str(directory), str(tmp_path / "pair.jsonl"), device="cpu")
    rejected = logit(directory, encode(tokenizer, templated(tokenizer, "No.")))
    assert evaluated["reward_margin"] == pytest.approx(expected - rejected, abs=1e-5)
    convert(directory, tmp_path / "converted")
    converted = RewardScorer.from_pretrained(tmp_path / "converted", "cpu")
    assert reward(converted) == pytest.approx(expected, abs=1e-5)


def pairs(chat: bool) -> list[dict[str, Any]]:
    def side(answer: str) -> Any:
        return [{"role": "assistant", "content": answer}] if chat else answer

    prompt: Any = USER if chat else QUESTION
    return [{"prompt": prompt, "chosen": side(ANSWER), "rejected": side("No.")}] * 4


@pytest.mark.parametrize("name", ["qwen 2.5", "llama 3.1, pad is the turn's end", "text"])
def test_what_trl_trained_is_read_where_trl_trained_it(name: str, tmp_path: Path) -> None:
    """By TRL's own trainer, whose directory tells of it; its collator's ids are the formula."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    is_chat = name != "text"
    tokenizer = letters_tokenizer(CHAT_SYSTEMS.get(name), eos_token="<|eos|>", pad_token="<|pad|>")
    base = saved(tmp_path / "base", tokenizer)
    arguments = RewardConfig(
        str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, bf16=False,
    )  # fmt: skip
    trainer = RewardTrainer(
        str(base), args=arguments, train_dataset=Dataset.from_list(pairs(is_chat)),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    [trained, *_] = trainer.train_dataset["chosen_ids"]
    scorer = RewardScorer.from_pretrained(tmp_path / "trl", "cpu")
    expected = logit(tmp_path / "trl", list(trained))
    prompt: Any = USER if is_chat else QUESTION
    assert reward(scorer, prompt) == pytest.approx(expected, abs=1e-5)
    assert scorer.members[0].inferred is not None
    assert scorer.members[0].inferred.doubt is None


def as_openrlhf_trains(tokenizer: Any, text: str) -> list[int]:
    """openrlhf/datasets/reward_dataset.py."""
    text = text.rstrip("\n")
    if not text.endswith(tokenizer.eos_token):
        text += " " + tokenizer.eos_token
    return encode(tokenizer, text)


@pytest.mark.parametrize("name", [*CHAT_SYSTEMS, "text"])
def test_openrlhf_ends_with_a_space_and_eos(name: str, tmp_path: Path) -> None:
    is_chat = name != "text"
    tokenizer = letters_tokenizer(
        CHAT_SYSTEMS.get(name), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    openrlhf = {"value_head_prefix": "score", "normalize_reward": False}
    directory = saved(tmp_path / "model", tokenizer, **openrlhf)
    text = templated(tokenizer) if is_chat else QUESTION + ANSWER
    expected = as_openrlhf_trains(tokenizer, text)
    render = renderer_of(directory)
    assert render.render(USER if is_chat else QUESTION, ANSWER) == expected
    if not is_chat:
        assert render.render(QUESTION, ANSWER + "\n\n") == expected
        for answer in (ANSWER + "</s>", "ends in a blank ", "</s>", " </s>\n"):
            own = as_openrlhf_trains(tokenizer, QUESTION + answer)
            assert render.render(QUESTION, answer) == own
    # Its service ends whatever it gets with EOS, and nothing else.
    bare = encode(tokenizer, ANSWER)
    whole = [Whole(texts=[ANSWER]), Whole(ids=[bare]), Whole(ids=[[*bare, expected[-1]]])]
    for given in whole:
        assert render.sequences(given) == [[*bare, expected[-1]]]


def test_a_head_that_is_named_by_hand_is_nobodys(tmp_path: Path) -> None:
    tokenizer = letters_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    directory = saved(tmp_path / "model", tokenizer, value_head_prefix="score")
    with pytest.warns(UserWarning, match="is scored as it comes, without EOS"):
        opened = open_directory(directory)
    assert opened.contract.add_special_tokens
    assert opened.contract.end_text is None


def test_an_end_depends_on_what_stands_before_it_in_old_vocabularies(tmp_path: Path) -> None:
    """A normalizer that writes a blank before every text writes none before the end of one."""
    from tokenizers import normalizers

    tokenizer = letters_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    openrlhf = {"value_head_prefix": "score", "normalize_reward": False}
    render = renderer_of(saved(tmp_path / "model", tokenizer, **openrlhf))
    expected = as_openrlhf_trains(tokenizer, "a b")
    assert render.render("a ", "b") == expected
    ids = Group(prompt_ids=expected[:2], completion_ids=[expected[2:-2], expected[2:-1]])
    assert render.sequences(ids) == [expected, expected]


def test_a_reward_token_ends_everything(tmp_path: Path) -> None:
    tokenizer = letters_tokenizer(CHAT_SYSTEMS["internlm 2"])
    token = len(tokenizer) - 1
    directory = saved(tmp_path / "model", tokenizer, reward_token_id=token)
    whole = encode(tokenizer, templated(tokenizer))
    render = renderer_of(directory)
    assert render.render(USER, ANSWER) == [*whole, token]
    for given in (
        Whole(texts=[templated(tokenizer)]),
        Whole(ids=[whole]),
        Whole(ids=[[*whole, token]]),
    ):
        assert render.sequences(given) == [[*whole, token]]
    for keep, rest in (("left", whole[:9]), ("right", whole[-9:])):
        cut = Whole(ids=[whole], max_tokens=10, keep=keep)  # type: ignore[arg-type]
        assert render.sequences(cut) == [[*rest, token]]
    scorer = RewardScorer.from_pretrained(directory, "cpu")
    assert reward(scorer) == pytest.approx(at_last(directory, [*whole, token]), abs=1e-5)


CARD = "---\nlibrary_name: transformers\ntags:\n- trl\n- reward-trainer\n---\n# A model\n"


@pytest.mark.parametrize(
    ("files", "append_eos", "is_sure"),
    [
        ({}, False, False),
        ({"README.md": CARD}, True, True),
        ({"README.md": "---\ntags: [text-classification]\n---\nreward-trainer"}, False, False),
        ({"README.md": "---\n: [\n---\n"}, False, False),
        ({"training_args.bin": "PK trl.trainer.reward_config RewardConfig"}, True, True),
        ({"training_args.bin": "PK transformers TrainingArguments"}, False, False),
        ({"training_args.bin": ""}, True, False),
    ],
)
def test_who_trained_a_text_model_says_whether_it_ends_with_eos(
    files: dict[str, str], append_eos: bool, is_sure: bool, tmp_path: Path
) -> None:
    tokenizer = letters_tokenizer(eos_token="<|eos|>", pad_token="<|pad|>")
    directory = saved(tmp_path / "model", tokenizer)
    for name, text in files.items():
        (directory / name).write_text(text)
    option = "--no-append-eos" if append_eos else "--append-eos"
    if is_sure:
        opened = open_directory(directory)
    else:
        with pytest.warns(UserWarning, match=f"rayward convert .* DST {option}"):
            opened = open_directory(directory)
    assert opened.contract.append_eos == append_eos
    render = Renderer(opened.tokenizer, opened.contract)
    ends = [tokenizer.eos_token_id] * append_eos
    assert render.render("a", "b") == [*encode(tokenizer, "ab"), *ends]


@pytest.mark.parametrize(
    ("ends_with", "append_eos", "end"),
    [
        ("none", None, ""),
        ("<|im_end|>", None, "<|im_end|>"),
        ("<|im_end|>\n\n", None, "<|im_end|>\n\n"),
        ("\n", None, "\n"),
        (None, True, "<|im_end|>\n<|endoftext|>"),
        ("none", True, "<|endoftext|>"),
        ("<|endoftext|>", True, "<|endoftext|>"),
    ],
)
def test_an_end_can_be_said(
    ends_with: str | None, append_eos: bool | None, end: str, tmp_path: Path
) -> None:
    system = CHAT_SYSTEMS["qwen 2.5"]
    tokenizer = letters_tokenizer(system)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.pad_token = "<|im_start|>"
    directory = saved(tmp_path / "model", tokenizer)
    told: list[str] = []
    contract = convert(
        directory, tmp_path / "to", ends_with=ends_with, append_eos=append_eos, tell=told.append
    )
    assert any("as you said" in line for line in told)
    render = Renderer(tokenizer, contract)
    text = templated(tokenizer).removesuffix("<|im_end|>\n") + end
    assert render.render(USER, ANSWER) == encode(tokenizer, text)
    assert render.render(USER, "ends in blanks \n ")[-len(encode(tokenizer, end)) or None :] == (
        encode(tokenizer, end) or render.render(USER, "ends in blanks \n ")
    )


def test_a_contract_says_how_its_sequences_end(export_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="says how its sequences end"):
        convert(export_dir, tmp_path / "to", ends_with="none")


def test_contracts_from_before_keep_their_json(export_dir: Path) -> None:
    contract = ScoringContract.load(export_dir)
    assert contract is not None
    old = contract.to_json()
    for name in ("plain_content", "end_text", "end_ids", "final_token_id", "drop_trailing_ids"):
        old.pop(name, None)
    assert ScoringContract.from_json(old).to_json() == old


def test_an_explanation_shows_what_was_read(tmp_path: Path) -> None:
    tokenizer = letters_tokenizer(CHAT_SYSTEMS["qwen 2.5"])
    directory = saved(tmp_path / "model", tokenizer)
    scorer = RewardScorer.from_pretrained(directory, "cpu")
    lines = list(explain(scorer, Group(USER, [ANSWER, "\ud800"])))
    [read] = [line for line in lines if "<- read here" in line]
    assert read.split()[1:3] == [str(tokenizer.convert_tokens_to_ids("Ċ")), '"\\n"']
    text = "\n".join(lines)
    assert 'end_text = "\\n"  (inferred: what the chat template writes' in text
    assert f"reward {reward(scorer):.7g} = (raw score - 0) / 1" in text
    assert re.search(r"path forest in blocks(, paged)?, float32", text)
    assert "unrenderable: the text is not valid Unicode" in text
