"""vLLM's scheduler for early-exit models: which requests share a cached block, and what goes back with a token."""

from __future__ import annotations

import secrets
from hashlib import blake2b
from typing import Any

import numpy as np
from vllm.v1.core.sched.scheduler import Scheduler

from .request_metadata import EXTRA, RequestMetadata, exit_layout


class ExitScheduler(Scheduler):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.aux_output_connector = DepthConnector()
        self.first_token = exit_layout(self.vllm_config).first_token

    def add_request(self, request: Any) -> None:
        salt(request, self.hash_block_size, self.first_token)
        super().add_request(request)


def salt(request: Any, block: int, first_token: bool) -> None:
    """Blocks of `block` positions that hold one that may exit are reused by this request alone.

    vLLM finds a block by its tokens and those before it, but keys and values of a position that has left depend on its
    exit, too. A prompt's positions never leave, except for its last with `first_token`: blocks of the others are
    everybody's. Nobody finds the block of its own last position, for vLLM always computes that one again.
    """
    extra = ((request.sampling_params and request.sampling_params.extra_args) or {}).get(EXTRA)
    plain = request._block_hasher
    if plain is None or extra is None or RequestMetadata.full_depth(extra):
        return
    shared, own = (extra["prompt"] - first_token) // block, secrets.token_bytes(16)

    def hasher(request: Any) -> list[bytes]:
        first = len(request.block_hashes)
        return [
            name if number < shared else blake2b(name, key=own, digest_size=32).digest()
            for number, name in enumerate(plain(request), start=first)
        ]

    request._block_hasher = hasher
    del request.block_hashes[shared:]
    request.update_block_hashes()


class DepthConnector:
    """The way of depths from the worker to the front end: that of routed experts, which these models don't have."""

    def build_connector_meta(self, scheduler_output: Any, requests: Any) -> None:
        return None

    def take_output(self, request: Any, output: dict[str, Any] | None) -> np.ndarray | None:
        depths = (output or {}).get(request.request_id)
        return None if depths is None else depths.rows

    def request_finished(self, request: Any) -> None:
        pass

    def reset(self) -> None:
        pass
