"""Early exits in vLLM's front end, the process that speaks HTTP: what requests may ask for, and depths in answers.

vLLM has no hooks for either, so methods of its classes are wrapped, all of them here, and only where an early-exit
export is served. Fields are those of this package's own server (`rollout/server/protocol.py`).
"""

from __future__ import annotations

import inspect
import json
import secrets
from collections.abc import AsyncIterator, Callable
from copy import copy
from functools import cache, wraps
from typing import Any

from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import RequestState
from vllm.v1.engine.parallel_sampling import ParentRequest

from .request_metadata import EXTRA, FIELD, RequestMetadata, check_names, rule_for

# What JSON can hold of a log-probability; vLLM's own bound.
LOWEST = -9999.0


@cache
def install() -> None:
    """Once for the process; models without exits may be served beside."""
    for owner, name, change in (
        (InputProcessor, "process_inputs", _given_exits),
        (ParentRequest, "_get_child_sampling_params", _numbered),
        (RequestState, "_new_completion_output", _with_rows),
        (OpenAIServingCompletion, "render_completion_request", _checked),
        (OpenAIServingChat, "render_chat_request", _checked),
        (OpenAIServingCompletion, "request_output_to_completion_response", _completion),
        (OpenAIServingChat, "chat_completion_full_generator", _chat),
        (OpenAIServingCompletion, "completion_stream_generator", _streamed),
        (OpenAIServingChat, "chat_completion_stream_generator", _streamed),
    ):
        plain = getattr(owner, name)
        setattr(owner, name, wraps(plain)(change(plain)))


# ---- requests ----


def _checked(plain: Callable) -> Callable:
    async def render(self: Any, request: Any) -> Any:
        """What is wrong with a request's exits is said before anything runs."""
        config = self.engine_client.vllm_config
        if has_exits(config):
            try:
                ask(config, request)
            except ValueError as error:
                return self.create_error_response(str(error), param=FIELD)
        return await plain(self, request)

    return render


def has_exits(config: Any) -> bool:
    return hasattr(config.model_config.hf_config, FIELD)


def ask(config: Any, request: Any) -> None:
    """Check an HTTP request's fields, and move them to where vLLM carries them along. Raises ValueError."""
    fields, carried = request.model_extra or {}, dict(request.vllm_xargs or {})
    check_names([*fields, *carried])
    if request.use_beam_search:
        raise ValueError("use_beam_search reads every token as part of a prompt, which never exits; leave it out")
    if fields.get(FIELD) is not None:
        carried[FIELD] = fields[FIELD]
    rule_for(config, carried.get(FIELD))
    request.vllm_xargs = carried


def _given_exits(plain: Callable) -> Callable:
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Add an exit rule (the request's, else the export's) and a random stream to a request; every path into the
        engine calls this."""
        request = plain(self, *args, **kwargs)
        sampling = request.sampling_params
        if sampling is None or not has_exits(self.vllm_config):
            return request
        carried = dict(sampling.extra_args or {})
        try:
            check_names(carried)
            rule = rule_for(self.vllm_config, carried.pop(FIELD, None))
        except ValueError as error:
            raise VLLMValidationError(str(error)) from None
        if request.resumable:
            raise VLLMValidationError("input that comes in pieces is not answered with early exits; send it whole")
        prompt = request.prompt_embeds if request.prompt_token_ids is None else request.prompt_token_ids
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        sampling.extra_args = {**carried, EXTRA: RequestMetadata.served(rule, len(prompt), (seed, "", 0))}
        return request

    return process_inputs


def _numbered(plain: Callable) -> Callable:
    def child(self: Any, index: int) -> Any:
        """The n answers to one request share its seed and differ in their number, as in this package's server."""
        params = plain(self, index)
        metadata = (params.extra_args or {}).get(EXTRA)
        if metadata is None:
            return params
        params = copy(params)
        seed, prompt, _ = metadata["stream"]
        params.extra_args = {**params.extra_args, EXTRA: {**metadata, "stream": [seed, prompt, index]}}
        return params

    return child


# ---- answers ----


def _with_rows(plain: Callable) -> Callable:
    def completion_output(self: Any, *args: Any) -> Any:
        output = plain(self, *args)
        # A row for each token of the answer so far, in a list that grows: outputs may be merged before they are read.
        output.early_exit, output.routed_experts = self.routed_experts_chunks, None
        return output

    return completion_output


class AnswerDepths:
    """What is known of one HTTP request's answers, by the index of their choice, until it is said."""

    def __init__(self, config: Any, hide_tokens: bool = False):
        self._layers, self._hide = config.hf_config.num_hidden_layers, hide_tokens
        self._read: dict[int, int] = {}
        self._unsaid: dict[int, list[tuple[int, Any]]] = {}
        self._depths: list[float] = []

    def take(self, index: int, output: Any) -> None:
        """`output` has the tokens since the last."""
        first = self._read.get(index, 0)
        self._read[index] = stop = first + len(output.token_ids)
        rows = [row[0] for row in output.early_exit[first:stop]]
        self._unsaid.setdefault(index, []).extend(zip(output.token_ids, rows, strict=True))
        self._depths += [row[0] for row in rows]

    async def watching(self, results: Any, answers: int) -> AsyncIterator[Any]:
        """The same results, taken as they pass. Of several prompts each comes with the number of its own, to which
        there are `answers`."""
        async for item in results:
            number, result = item if isinstance(item, tuple) else (0, item)
            for output in result.outputs:
                self.take(output.index + number * answers, output)
            yield item

    def fields(self, index: int) -> dict[str, list]:
        said = self._unsaid.pop(index, [])
        tokens: dict[str, list] = {} if self._hide else {"token_ids": [int(token) for token, _ in said]}
        return tokens | {
            "depths": [int(row[0]) for _, row in said],
            "logprobs": [max(float(row[1]), LOWEST) for _, row in said],
            "exit_logprobs": [max(float(row[2]), LOWEST) for _, row in said],
        }

    @property
    def mean_depth(self) -> float | None:
        """As a share of the layers."""
        return float(sum(self._depths) / len(self._depths) / self._layers) if self._depths else None

    def add_to(self, response: Any) -> None:
        for choice in response.choices:
            choice.early_exit = self.fields(choice.index)
        response.usage.mean_depth = self.mean_depth

    def add_to_chunk(self, chunk: str) -> str:
        """A server-sent event, with what is known of the tokens that it reports."""
        if not chunk.startswith("data: {"):
            return chunk
        body = json.loads(chunk.removeprefix("data: "))
        for choice in body.get("choices", ()):
            # The chunk that names the role comes before all tokens.
            if "role" not in choice.get("delta", ()):
                choice["early_exit"] = self.fields(choice["index"])
        if not body.get("choices") and body.get("usage"):
            body["usage"]["mean_depth"] = self.mean_depth
        return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def depths_of(serving: Any, request: Any) -> AnswerDepths:
    # A client that may not see a model's reasoning must not see its tokens either.
    hidden = not getattr(request, "include_reasoning", True) and getattr(serving, "parser_cls", None) is not None
    return AnswerDepths(serving.model_config, hidden)


def _completion(plain: Callable) -> Callable:
    def response(self: Any, results: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        made = plain(self, results, request, *args, **kwargs)
        if has_exits(self.engine_client.vllm_config):
            depths = depths_of(self, request)
            for index, output in enumerate(output for result in results for output in result.outputs):
                depths.take(index, output)
            depths.add_to(made)
        return made

    return response


def _chat(plain: Callable) -> Callable:
    async def response(self: Any, request: Any, results: Any, *args: Any, **kwargs: Any) -> Any:
        if not has_exits(self.engine_client.vllm_config):
            return await plain(self, request, results, *args, **kwargs)
        depths = depths_of(self, request)
        made = await plain(self, request, depths.watching(results, 1), *args, **kwargs)
        if hasattr(made, "choices"):
            depths.add_to(made)
        return made

    return response


def _streamed(plain: Callable) -> Callable:
    signature = inspect.signature(plain)

    async def chunks(self: Any, *args: Any, **kwargs: Any) -> AsyncIterator[str]:
        bound = signature.bind(self, *args, **kwargs)
        request, results = bound.arguments["request"], bound.arguments["result_generator"]
        if not has_exits(self.engine_client.vllm_config):
            async for chunk in plain(*bound.args, **bound.kwargs):
                yield chunk
            return
        depths = depths_of(self, request)

        bound.arguments["result_generator"] = depths.watching(results, request.n or 1)
        stream = plain(*bound.args, **bound.kwargs)
        try:
            async for chunk in stream:
                yield depths.add_to_chunk(chunk)
        finally:
            # A client that has left is to free its place now, not when somebody collects what is not closed.
            await stream.aclose()
            await results.aclose()

    return chunks
