"""Conversations with tools, calls, results and reasoning: one sequence by every way to it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from chat_systems import CHAT_SYSTEMS, letters_tokenizer
from conversations import (
    ANSWER,
    ARGS,
    ASKED,
    CALLING,
    ROW,
    TEMPLATE,
    TOOLS,
    sequence,
    tool_renderer,
)
from families import make_network
from fastapi.exceptions import RequestValidationError

from reward_actor import Group, RewardServiceError, schema
from reward_actor.client import bodies
from reward_actor.files import group_of, question_of
from reward_actor.groups import SampleError, Whole
from reward_actor.integrations.grouping import to_groups
from reward_actor.model.inferred import contract_for
from reward_actor.render import Renderer, RenderError
from reward_actor.rollout.policy import group_to_score
from reward_actor.rollout.records import RolloutGroup
from serve.http.requests import parse
from serve.ingress.service import _check_given
from serve.protocols import vllm_request
from serve.protocols.native import to_group
from trainer.config.data import Columns
from trainer.data.load import gather_rows
from trainer.data.parse import parse_line, parse_row
from trainer.data.render import Rules


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return tool_renderer()


@pytest.fixture(scope="module")
def expected(renderer: Renderer) -> list[int]:
    """What training renders."""
    pair = {"prompt": ASKED, "chosen": ANSWER, "rejected": "No.", "tools": TOOLS,
            "chat_template_kwargs": ARGS}  # fmt: skip
    row = parse_line(1, json.dumps(pair).encode(), Columns())
    ids = renderer.render(
        row.sides[0].prompt, ANSWER, tools=row.tools, template_args=row.template_args
    )
    text = renderer.tokenizer.decode(ids)
    for part in ("Rain?\nNow.", "<call>weather</call>", "I look.", "3 mm", "(brief) Yes."):
        assert part in text
    assert "null" not in text
    assert "None" not in text
    return ids


@pytest.mark.parametrize("as_json", [(), ("tools",), ("prompt", "tools", "chat_template_kwargs")])
def test_a_row_of_a_file(renderer: Renderer, expected: list[int], as_json: tuple[str, ...]) -> None:
    row = {k: json.dumps(v) if k in as_json else v for k, v in ROW.items()}
    assert sequence(renderer, group_of(row, "in:1")) == expected


@pytest.mark.parametrize("as_json", [(), ("prompt", "tools", "chosen")])
def test_a_training_row_of_a_table(
    renderer: Renderer, expected: list[int], as_json: tuple[str, ...]
) -> None:
    pair = {"prompt": ASKED, "chosen": [{"role": "assistant", "content": ANSWER}],
            "rejected": "No.", "tools": TOOLS, "chat_template_kwargs": ARGS}  # fmt: skip
    pair = {k: json.dumps(v) if k in as_json else v for k, v in pair.items()}
    row = parse_line(1, json.dumps(pair).encode(), Columns())
    side = row.sides[0]
    found = renderer.render(
        side.prompt, side.completion, tools=row.tools, template_args=row.template_args
    )
    assert found == expected


def test_a_request(renderer: Renderer, expected: list[int]) -> None:
    body = json.dumps({"groups": [ROW]}).encode()
    [group] = parse(schema.ScoreRequest, body).groups
    assert sequence(renderer, to_group(group)) == expected


@pytest.mark.parametrize(("left", "right"), [("[", "]"), ('{"a":', "}")])
def test_what_the_parser_lets_in_is_not_too_deep_for_a_template(
    renderer: Renderer, left: str, right: str
) -> None:
    deep = json.loads(left * 180 + "1" + right * 180)
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": deep}}}
    calling = {"role": "assistant", "content": ANSWER, "tool_calls": [call]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": deep}}}]
    said = [*ASKED, calling]
    row = {"prompt": said, "completions": [calling], "tools": tools}
    row["chat_template_kwargs"] = {"a": deep}
    [group] = parse(schema.ScoreRequest, json.dumps({"groups": [row]}).encode()).groups
    said = [*ASKED, {**calling, "colour": deep}]
    asked = {"messages": said, "tools": tools, "chat_template_kwargs": {"a": deep}}
    lenient = parse(vllm_request.VllmRequest, json.dumps(asked).encode())
    for each in (to_group(group), vllm_request.to_group(lenient)):
        [ids] = renderer.sequences(each)
        assert isinstance(ids, list | SampleError)


def test_what_a_client_sends(renderer: Renderer, expected: list[int]) -> None:
    given = group_of(ROW, "in:1")
    bodies.check(given)
    body, media_type = bodies.encode([given], token_rewards=False)
    assert media_type == bodies.JSON
    [group] = parse(schema.ScoreRequest, body).groups
    assert sequence(renderer, to_group(group)) == expected
    plain = Group(given.prompt, given.completions)
    assert bodies.weight(given) > bodies.weight(plain)


def test_an_adapters_samples(renderer: Renderer, expected: list[int]) -> None:
    said = [{"role": "assistant", "content": ANSWER}]
    groups, samples = to_groups([ASKED] * 2, [said, ANSWER], [TOOLS] * 2, [ARGS, json.dumps(ARGS)])
    assert samples.places == [[0, 1]]
    assert renderer.sequences(groups[0]) == [expected, expected]
    # The turns that a completion begins with are the prompt's.
    [group] = to_groups([ASKED[:1]], [[*ASKED[1:], *said]], [TOOLS], [ARGS])[0]
    assert sequence(renderer, group) == expected
    assert to_groups([ASKED] * 2, [ANSWER] * 2, [TOOLS, None])[1].places == [[0], [1]]


def test_a_group_as_python_has_it(renderer: Renderer, expected: list[int]) -> None:
    """Whoever gives it to a scorer or a handle has read it by nothing of ours."""
    raw = Group(ASKED, [ANSWER], tools=TOOLS, template_args=ARGS)
    assert sequence(renderer, raw) == expected
    arrays = Group(
        np.array(ASKED, dtype=object), [ANSWER], tools=np.array(TOOLS), template_args=ARGS
    )
    assert sequence(renderer, arrays) == expected
    [group] = to_groups([np.array(ASKED, dtype=object)], [ANSWER], [np.array(TOOLS)], [ARGS])[0]
    assert sequence(renderer, group) == expected


# ---- the turn that is scored


@pytest.mark.parametrize("chosen", [CALLING, [CALLING], [ASKED[0], CALLING]])
def test_a_scored_turn_thinks_and_calls_by_every_way(renderer: Renderer, chosen: Any) -> None:
    pair = {"prompt": ASKED[:1], "chosen": chosen, "rejected": "No.", "tools": TOOLS}
    row = parse_row(1, pair, Columns())
    side = row.sides[0]
    trained = renderer.render(side.prompt, side.completion, tools=row.tools)
    text = renderer.tokenizer.decode(trained)
    assert text.endswith("<think>I look.</think><call>weather</call>{}<|im_end|>")

    scored = {"prompt": ASKED[:1], "completions": ["No.", CALLING], "tools": TOOLS}
    from_file = group_of(scored, "in:1")
    body, _ = bodies.encode([from_file], token_rewards=False)
    requests = [
        parse(schema.ScoreRequest, sent).groups[0]
        for sent in (body, json.dumps({"groups": [scored]}).encode())
    ]
    [adapted] = to_groups([ASKED[:1]] * 2, ["No.", [CALLING]], [TOOLS] * 2)[0]
    raw = Group(ASKED[:1], ["No.", CALLING], tools=TOOLS)
    for group in (from_file, *map(to_group, requests), adapted, raw):
        assert renderer.sequences(group)[1] == trained
    said = {**CALLING, "reasoning": CALLING["reasoning_content"], "reasoning_content": None}
    for last in (CALLING, said):
        asked = {"messages": [ASKED[0], last], "tools": TOOLS}
        request = parse(vllm_request.VllmRequest, json.dumps(asked).encode())
        assert sequence(renderer, vllm_request.to_group(request)) == trained
    # A message with nothing but a text is that text.
    [plain] = group_of(
        {**scored, "completions": [{"role": "assistant", "content": "a"}]}, ""
    ).completions
    assert plain == "a"


NO_TURNS: list[tuple[Any, str]] = [
    ({"role": "tool", "content": "3 mm"}, "of 'tool', not 'assistant'"),
    ({"role": "assistant", "content": None, "reasoning_content": "Hm."}, "content is null"),
    ({"role": "assistant", "content": [{"type": "image"}]}, "a reward model reads text"),
]


@pytest.mark.parametrize(("message", "why"), NO_TURNS)
def test_what_is_no_turn_to_score_is_an_error_of_its_sample(
    renderer: Renderer, message: Any, why: str
) -> None:
    good, bad = renderer.sequences(Group("Hi.", [ANSWER, message]))
    assert isinstance(good, list)
    assert isinstance(bad, SampleError)
    assert why in bad.message
    _, samples = to_groups(["Hi."] * 3, [ANSWER, [ASKED[1], message], ANSWER])
    assert samples.places == [[0, 2]]
    assert samples.errors.keys() == {1}
    assert why in samples.errors[1].message
    with pytest.raises(ValueError, match=r"in:1: completions\.0"):
        group_of({"prompt": "Hi.", "completions": [message]}, "in:1")
    with pytest.raises(ValueError, match="'chosen'"):
        parse_row(1, {"prompt": "Hi.", "chosen": [message], "rejected": "b"}, Columns())
    body = json.dumps({"groups": [{"prompt": "Hi.", "completions": ["a", message]}]}).encode()
    with pytest.raises(RequestValidationError) as refused:
        parse(schema.ScoreRequest, body)
    for error in refused.value.errors():
        assert error["loc"][:4] == ["groups", 0, "completions", 1]


def test_a_message_needs_a_chat_contract(renderer: Renderer) -> None:
    text = Renderer(renderer.tokenizer, replace(renderer.contract, format="text"))
    plain = {"role": "assistant", "content": "a"}
    good, bad = text.sequences(Group("p", [plain, CALLING]))
    assert good == text.render("p", "a")
    assert isinstance(bad, SampleError)
    assert "needs a chat contract" in bad.message


# ---- calls


def called(arguments: Any) -> list[Any]:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [ASKED[0], {"role": "assistant", "content": None, "tool_calls": [call]}, ASKED[2]]


def letters_renderer(system: str, **changes: Any) -> Renderer:
    tokenizer = letters_tokenizer(CHAT_SYSTEMS[system])
    network = make_network("qwen3", pad_token_id=tokenizer.pad_token_id)
    contract = contract_for(tokenizer, network.config, format="chat")
    return Renderer(tokenizer, replace(contract, **changes))


@pytest.mark.parametrize("system", ["qwen 2.5", "qwen 3", "llama 3.1"])
@pytest.mark.parametrize("arguments", [{"city": "Rome", "days": [1, 2]}, {}])
def test_arguments_as_text_are_the_object_that_they_say(system: str, arguments: Any) -> None:
    renderer = letters_renderer(system)
    ids = renderer.render(called(arguments), ANSWER)
    assert renderer.render(called(json.dumps(arguments, indent=1)), ANSWER) == ids
    assert json.dumps(arguments) in renderer.tokenizer.decode(ids)
    if not arguments:
        assert renderer.render(called(""), ANSWER) == ids


def test_a_null_that_a_policy_sampled_stays() -> None:
    """Nulls go from objects, which tables pad with them."""
    renderer = letters_renderer("qwen 2.5")
    text = renderer.tokenizer.decode(renderer.render(called('{"unit": null}'), ANSWER))
    assert '"arguments": {"unit": null}' in text
    text = renderer.tokenizer.decode(renderer.render(called({"unit": None}), ANSWER))
    assert '"arguments": {}' in text


@pytest.mark.parametrize("given", ['{"city":"Rome"}', '{"city": "Rome"}', '{"city": '])
def test_a_template_for_text_alone_gets_the_text_as_it_was_sampled(given: str) -> None:
    renderer = letters_renderer("deepseek 3")
    assert given in renderer.tokenizer.decode(renderer.render(called(given), ANSWER))
    as_object = renderer.render(called({"city": "Rome"}), ANSWER)
    assert '{"city": "Rome"}' in renderer.tokenizer.decode(as_object)


def test_exports_from_before_keep_arguments_as_text() -> None:
    given = '{"city": "Rome"}'
    for parses in (False, True):
        renderer = letters_renderer("qwen 2.5", parse_arguments=parses)
        text = renderer.tokenizer.decode(renderer.render(called(given), ANSWER))
        assert (json.dumps(given) in text) != parses
        assert f'"arguments": {given}' in text or not parses
    assert "parse_arguments" not in replace(renderer.contract, parse_arguments=False).to_json()


def test_a_call_that_is_no_json_stays_as_it_was_sampled() -> None:
    renderer = letters_renderer("qwen 2.5")
    for sampled in ('{"city": ', "[1]", "null", '"{}"'):
        text = renderer.tokenizer.decode(renderer.render(called(sampled), ANSWER))
        assert f'"arguments": {json.dumps(sampled)}' in text


def test_what_is_lost_is_asked_again_where_the_template_is_told_otherwise() -> None:
    qwen = letters_renderer("qwen 2.5")
    contract = replace(
        qwen.contract,
        chat_template="{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if mode != 'short' or loop.last %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}",
    )
    renderer = Renderer(qwen.tokenizer, contract)
    prompt = [{"role": "user", "content": "Rain?"}]
    renderer.render(prompt, ANSWER, template_args={"mode": "long"})
    with pytest.raises(RenderError, match="leaves out the content of message 0"):
        renderer.render(prompt, ANSWER, template_args={"mode": "short"})


def test_a_contracts_template_args_hold_where_a_sample_gives_no_other(
    renderer: Renderer, expected: list[int]
) -> None:
    told = Renderer(renderer.tokenizer, replace(renderer.contract, template_args=ARGS))
    row = {name: value for name, value in ROW.items() if name != "chat_template_kwargs"}
    for own in ({}, {"other": 1}):
        assert sequence(told, group_of({**row, "chat_template_kwargs": own}, "in:1")) == expected
    other = group_of({**row, "chat_template_kwargs": {"brief": False}}, "in:1")
    assert sequence(told, other) == sequence(renderer, other) != expected
    pair = {"prompt": ASKED, "chosen": ANSWER, "rejected": "No.", "tools": TOOLS}
    trained = gather_rows({"in": [parse_row(1, pair, Columns())]}, told, Rules())
    assert trained.comparisons.sequences(0)[0] == expected


def test_template_args_decide_how_a_conversation_begins_and_ends() -> None:
    tokenizer = letters_tokenizer(CHAT_SYSTEMS["qwen 2.5"])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if marks %}<|im_start|>{% endif %}{{ m.role }}: {{ m.content }}"
        "{% if marks %}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{% if marks %}<|im_start|>{% endif %}assistant: {% endif %}"
    )
    config = make_network("qwen3", pad_token_id=tokenizer.pad_token_id).config
    plain, told = (
        Renderer(tokenizer, contract_for(tokenizer, config, format="chat", template_args=args))
        for args in (None, {"marks": True})
    )
    assert (plain.contract.turn_end, told.contract.turn_end) == ("", "<|im_end|>")
    templated = "<|im_start|>user: Hi.<|im_end|>\n<|im_start|>assistant: Yes.<|im_end|>"
    assert not plain.is_templated(templated)
    assert told.is_templated(templated)
    ids = told.render("Hi.", "Yes.")
    assert tokenizer.decode(ids) == templated
    assert told.sequences(Whole(texts=[templated + "\n"])) == [ids]
    assert told.prompt_ids("Hi.") == ids[: len(told.prompt_ids("Hi."))]


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"continue_final_message": True}, "must not be named 'continue_final_message'"),
        ({"brief": {"a": "<|im_"}, "x": ["end|>"]}, ""),
        ({"length": 5}, "the chat template refuses"),
    ],
)
def test_what_a_template_cannot_take_is_an_error_of_the_sample(
    args: dict[str, Any], why: str
) -> None:
    tokenizer = letters_tokenizer(CHAT_SYSTEMS["qwen 2.5"])
    tokenizer.chat_template = "{% if length %}{{ (length | list)[0].x.y }}{% endif %}" + TEMPLATE
    network = make_network("qwen3", pad_token_id=tokenizer.pad_token_id)
    render = Renderer(tokenizer, contract_for(tokenizer, network.config, format="chat"))
    group = Group("Hi.", [ANSWER], template_args=args)
    [found] = render.sequences(group)
    if why:
        assert isinstance(found, SampleError)
        assert why in found.message
    else:
        assert isinstance(found, list)
    assert render.num_prompt_tokens(group, [found]) is not None


def test_what_a_template_is_told_counts_for_every_completion() -> None:
    limit = 1000
    for told in ({"template_args": {"x": "y" * 60_000}}, {"tools": [{"x": "y" * 60_000}]}):
        _check_given([Group("p", ["a"], **told)], limit)
        with pytest.raises(RewardServiceError, match="characters in one request"):
            _check_given([Group("p", ["a"] * 2, **told)], limit)


def test_a_rollout(renderer: Renderer, expected: list[int]) -> None:
    question = question_of({k: v for k, v in ROW.items() if k != "completions"}, "in:1")
    assert question.prompt is not None
    told = {"tools": question.tools, "template_args": question.template_args}
    prompt_ids = renderer.prompt_ids(question.prompt, **told)
    completion_ids = [expected[len(prompt_ids) :]]
    rollout = RolloutGroup(question.prompt, prompt_ids, [ANSWER], completion_ids, **told)
    assert sequence(renderer, rollout.as_text()) == expected
    assert sequence(renderer, group_to_score(rollout, renderer)) == expected


def test_ids_are_rendered_already() -> None:
    with pytest.raises(ValueError, match="tools and template_args go with a prompt"):
        Group(prompt_ids=[1], completion_ids=[[2]], tools=TOOLS)
    body = {"prompt_ids": [1], "completion_ids": [[2]], "tools": TOOLS}
    with pytest.raises(RequestValidationError, match="go with a prompt"):
        parse(schema.ScoreRequest, json.dumps({"groups": [body]}).encode())


BAD: list[tuple[Any, str, str]] = [
    ("hello", "prompt.1", "is text, not a message"),
    ({"content": "a"}, "prompt.1.role", "is null, not text"),
    ({"role": "user"}, "prompt.1.content", "is null, not text, and the message calls no tool"),
    ({"role": "user", "content": 5}, "prompt.1.content", "is int, not text"),
    ({"role": "user", "content": ["a"]}, "prompt.1.content.0", "is no part"),
    (
        {"role": "user", "content": [{"type": "text", "text": 5}]},
        "prompt.1.content.0.text",
        "is int, not text",
    ),
    (
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        "prompt.1.content.0",
        "is of type 'image_url'; a reward model reads text",
    ),
    (
        {"role": "assistant", "content": "", "tool_calls": "x"},
        "prompt.1.tool_calls",
        "list of calls",
    ),
    ({"role": "tool", "content": "", "tool_call_id": 5}, "prompt.1.tool_call_id", "is int"),
]


@pytest.mark.parametrize(("message", "place", "why"), BAD, ids=[place for _, place, _ in BAD])
def test_what_is_no_message_is_named_by_its_place(message: Any, place: str, why: str) -> None:
    prompt = [ASKED[0], message]
    with pytest.raises(ValueError, match="in:1") as told:
        group_of({"prompt": prompt, "completions": ["a"]}, "in:1")
    assert f"{place} " in str(told.value)
    assert why in str(told.value)
    with pytest.raises(ValueError, match="1") as told:
        to_groups([prompt], ["a"])
    assert f"{place} " in str(told.value)
    body = json.dumps({"groups": [{"prompt": prompt, "completions": ["a"]}]}).encode()
    with pytest.raises(RequestValidationError) as refused:
        parse(schema.ScoreRequest, body)
    where = [".".join(map(str, error["loc"])) for error in refused.value.errors()]
    assert all(one.startswith("groups.0.prompt.1") for one in where), where
    # A message as a whole says which of its fields is missing.
    field = place.split(".")[2] if place.count(".") > 1 else ""
    assert field in str(refused.value.errors())


def test_the_json_schema_says_that_a_prompt_is_text_or_messages() -> None:
    properties = schema.GroupRequest.model_json_schema()["properties"]
    kinds = json.dumps(properties["prompt"])
    assert '"type": "string"' in kinds
    assert "ChatMessage" in kinds
    assert "CompletionMessage" in json.dumps(properties["completions"])
    assert {"tools", "chat_template_kwargs"} <= properties.keys()
