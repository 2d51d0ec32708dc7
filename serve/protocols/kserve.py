"""KServe's v2 inference protocol, as NeMo-Aligner's PyTriton clients speak it.

The model is called `reward_model`, or what the service calls it. `sentences` are whole texts,
templated by their sender, to which nothing is added; `tokens` are rows of ids, padded at the right,
of which the first `sequence_lengths` are scored. Tensors that are not known here are ignored.
Errors are `{"error": message}`, with the fields of the other routes beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from reward_actor.errors import RewardServiceError
from reward_actor.groups import Whole
from serve.errors import answer_error
from serve.http.auth import PublicRoute, ScoreRoute
from serve.http.requests import json_body, parse, service_of
from serve.protocols import kserve_tensors as tensors
from serve.protocols.drop_in import DropIn, drop_in_headers, values
from serve.protocols.kserve_tensors import InputTensor
from serve.protocols.native import check_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NAME = "reward_model"

_INPUTS = {"sentences": "BYTES", "tokens": "INT64", "sequence_lengths": "INT64"}
_BINARY = {"schema": {"type": "string", "format": "binary", "description": tensors.__doc__}}


class _InKserveWords(APIRoute):
    """Answers errors with a string where the other routes have an object: clients print it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_errors(request: Request) -> Response:
            try:
                return await handle(request)
            except (RewardServiceError, RequestValidationError, HTTPException) as error:
                response = answer_error(request, error)
                detail = json.loads(bytes(response.body))["error"]
                body = json.dumps({"error": detail.pop("message"), **detail})
                retry_after = response.headers.get("Retry-After")
                headers = {} if retry_after is None else {"Retry-After": retry_after}
                return Response(body, response.status_code, headers, "application/json")

        return handle_errors


class _Score(_InKserveWords, ScoreRoute):
    pass


class _Public(_InKserveWords, PublicRoute):
    pass


router = APIRouter(tags=["KServe v2"], route_class=_Score)
public = APIRouter(tags=["KServe v2"], route_class=_Public)


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate: legal in JSON, but only as an escape
        raise ValueError("it is not valid Unicode, and could not be sent back") from None
    return text


class OutputParameters(DropIn):
    binary_data: bool = False


class RequestedOutput(DropIn):
    name: str
    parameters: OutputParameters = OutputParameters()


class RequestParameters(DropIn):
    binary_data_output: bool = False


class InferRequest(DropIn):
    """`sentences` (BYTES), or `tokens` (INT64, a row a sample) with `sequence_lengths` (INT64)."""

    id: Annotated[str, AfterValidator(_encodable)] | None = None
    inputs: list[InputTensor]
    outputs: list[RequestedOutput] | None = None
    parameters: RequestParameters = RequestParameters()

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "inputs": [
                        {
                            "name": "tokens",
                            "datatype": "INT64",
                            "shape": [2, 3],
                            "data": [[5, 6, 7], [5, 8, 0]],
                        },
                        {
                            "name": "sequence_lengths",
                            "datatype": "INT64",
                            "shape": [2, 1],
                            "data": [[3], [2]],
                        },
                    ]
                }
            ]
        }
    )


class OutputTensor(BaseModel):
    name: Literal["rewards"]
    datatype: Literal["FP32"]
    shape: list[int]
    data: list[float] | None = None


class InferReply(BaseModel):
    """`data` of the output is absent where its bytes were asked for."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


@public.get("/v2/health/live")
async def live() -> dict[str, bool]:
    """The ingress is alive."""
    return {"live": True}


@public.get("/v2/health/ready")
async def ready(request: Request) -> dict[str, bool]:
    """A model is loaded and its golden samples passed."""
    await service_of(request).model()
    return {"ready": True}


@router.get("/v2/models/{name}/ready")
async def model_ready(request: Request, name: str) -> dict[str, Any]:
    """A model is loaded and its golden samples passed."""
    service = service_of(request)
    await check_model(service, name, _NAME)
    await service.model()
    return {"name": name, "ready": True}


@router.get("/v2/models/{name}")
async def metadata(request: Request, name: str) -> dict[str, Any]:
    """What the model takes and gives."""
    service = service_of(request)
    await check_model(service, name, _NAME)
    model = await service.model()
    return {
        "name": name,
        "versions": [model.version],
        "platform": "rayward",
        "inputs": [
            {"name": tensor, "datatype": datatype, "shape": [-1, -1]}
            for tensor, datatype in _INPUTS.items()
        ],
        "outputs": [{"name": "rewards", "datatype": "FP32", "shape": [-1, 1]}],
    }


@router.get("/v2/models/{name}/config")
async def config(request: Request, name: str) -> dict[str, Any]:
    """The same in the words of Triton's configuration, which PyTriton's clients read."""
    service = service_of(request)
    await check_model(service, name, _NAME)
    types = {"BYTES": "TYPE_STRING", "INT64": "TYPE_INT64"}
    return {
        "name": name,
        "platform": "rayward",
        "backend": "rayward",
        "max_batch_size": service.config.max_request_samples,
        "input": [
            {"name": tensor, "data_type": types[datatype], "dims": [-1], "optional": True}
            for tensor, datatype in _INPUTS.items()
        ],
        "output": [{"name": "rewards", "data_type": "TYPE_FP32", "dims": [1]}],
    }


@router.post(
    "/v2/models/{name}/infer",
    response_model=InferReply,
    openapi_extra=json_body(InferRequest, others={"application/octet-stream": _BINARY}),
)
async def infer(request: Request, name: str) -> Response:
    """Score texts, or rows of token ids; in JSON or in the binary tensor extension."""
    service, body = service_of(request), await request.body()
    await check_model(service, name, _NAME)
    try:
        head, raw = tensors.split(body, request.headers.get(tensors.HEADER_LENGTH))
        asked = parse(InferRequest, head)
        is_binary = _is_binary(asked)
        whole = to_whole(asked, raw)
    except ValueError as error:
        raise RequestValidationError([{"loc": ("body",), "msg": str(error)}]) from None
    scored = await service.score([whole])
    found = values(service, scored)
    output: dict[str, Any] = {"name": "rewards", "datatype": "FP32", "shape": [len(found), 1]}
    reply = {"model_name": name, "model_version": scored.model_version, "outputs": [output]}
    if asked.id is not None:
        reply["id"] = asked.id
    headers = drop_in_headers(scored)
    if not is_binary:
        output["data"] = found
        return Response(to_json(reply), headers=headers, media_type="application/json")
    content = tensors.floats(found)
    output["parameters"] = {"binary_data_size": len(content)}
    text = to_json(reply)
    headers[tensors.HEADER_LENGTH] = str(len(text))
    return Response(text + content, headers=headers, media_type="application/octet-stream")


def to_whole(request: InferRequest, raw: bytes) -> Whole:
    """The samples of the tensors. Raises ValueError."""
    parts = dict(
        zip(
            (tensor.name for tensor in request.inputs),
            zip(request.inputs, tensors.raw_parts(request.inputs, raw), strict=True),
            strict=True,
        )
    )
    if len(parts) != len(request.inputs):
        raise ValueError("two inputs have the same name")
    if ("sentences" in parts) == ("tokens" in parts):
        raise ValueError("give sentences, or tokens with sequence_lengths, not both")
    if "sentences" in parts:
        return Whole(tensors.texts(*parts["sentences"]))
    if "sequence_lengths" not in parts:
        raise ValueError("tokens need sequence_lengths: what pads a row must not be scored")
    return Whole(
        ids=_rows(
            tensors.integers(*parts["tokens"]), tensors.integers(*parts["sequence_lengths"]).ravel()
        )
    )


def _rows(tokens: NDArray[Any], lengths: NDArray[Any]) -> list[list[int]]:
    if tokens.ndim != 2:
        raise ValueError("tokens must have the shape [B, L]")
    if len(lengths) != len(tokens):
        raise ValueError(f"there are {len(tokens)} rows of tokens and {len(lengths)} lengths")
    if len(lengths) and not (lengths.min() >= 0 and lengths.max() <= tokens.shape[1]):
        raise ValueError(f"a sequence length is not between 0 and {tokens.shape[1]}")
    return [row[:n].tolist() for row, n in zip(tokens, lengths.tolist(), strict=True)]


def _is_binary(request: InferRequest) -> bool:
    """Whether the reply's tensor is to be bytes. Raises ValueError for an unknown output."""
    if request.outputs is None:
        return request.parameters.binary_data_output
    for output in request.outputs:
        if output.name != "rewards":
            raise ValueError("the only output is rewards")
    return any(output.parameters.binary_data for output in request.outputs) or (
        request.parameters.binary_data_output
    )
