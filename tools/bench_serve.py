"""Do hostile clients of `ee-megatron serve` cost the honest ones anything beside their share of the machine?

    python tools/bench_serve.py --tokenizer models/SmolLM2-135M-Instruct --json bench_serve.json

A tiny model from random weights is served under a memory limit (`--limit-mib`, ulimit -v). --clients ask at once, one
short request after another; in every second block a quarter of them is hostile instead:

- bodies of 3.9 MB, and bodies that are no JSON
- answers as long as the server gives, n at a time
- streams that nobody reads
- connections that send a byte of a request now and then

Blocks take turns, so that a drift of the machine's speed touches both kinds alike. For honest requests the table says
how many failed, and how long they took. Exit code 1 if one failed, or if the 95th percentile with hostile clients is
more than --factor times that without. One thread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS, HIDDEN, POSITIONS = 6, 64, 8192
START_S, ANSWER_S = 600, 120


@dataclass
class Block:
    """What honest clients saw in one block: seconds of each request that was answered, and what others were told."""

    hostile: bool
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Server:
    """`ee-megatron serve` in a process whose address space is limited."""

    def __init__(self, model: Path, limit_mib: int, rows: int):
        command = [
            sys.executable, "-m", "ee_megatron.cli", "serve", "--model", str(model), "--port", "0",
            "--rows", str(rows), "model.dtype=float32",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (limit_mib << 20,) * 2)

        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=limit
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().strip()
        if " on http://" not in self.line:
            self.process.kill()
            # It has said why.
            sys.exit(f"no server within {limit_mib} MiB for {rows} rows")
        self.port = int(self.line.split(" on http://")[1].split("/")[0].rsplit(":", 1)[1])
        self.name = self.line.split()[1]
        self.longest = int(self.line.split("a request: ")[1].split(",")[0])

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def make_model(directory: Path, tokenizer: Path) -> Path:
    """A random model with a real vocabulary, and gates on none of its layers."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=POSITIONS, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


async def ask(port: int, body: bytes, read: bool = True) -> tuple[int, bytes]:
    """Status and body of one POST on a connection of its own; with `read` off a stream is opened and left."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        if not read:
            # The socket's buffers fill up and stay so.
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(ANSWER_S)
            return 0, b""
        answer = await reader.read(-1)
        status, _, rest = answer.partition(b"\r\n\r\n")
        return int(status.split(b" ", 2)[1]), rest
    finally:
        writer.transport.abort()  # type: ignore[attr-defined]


def request(name: str, **fields: object) -> bytes:
    return json.dumps({"model": name, "temperature": 1.0, **fields}).encode()


async def honest(server: Server, block: Block, end: float, number: int) -> None:
    """One short request after another until the block is over."""
    draw = random.Random(number)
    while (begun := time.monotonic()) < end:
        prompt = f"Question {draw.randrange(10**6)}: what is {draw.randrange(99)} times {draw.randrange(99)}?"
        try:
            async with asyncio.timeout(ANSWER_S):
                status, answer = await ask(server.port, request(server.name, prompt=prompt, max_tokens=12))
            if status != 200 or not json.loads(answer)["choices"][0]["finish_reason"]:
                block.failures.append(f"{status}: {answer[:200].decode(errors='replace')}")
            else:
                block.seconds.append(time.monotonic() - begun)
        except (OSError, ValueError, TimeoutError, IndexError) as error:
            block.failures.append(f"{type(error).__name__}: {error}")


async def long_bodies(server: Server) -> None:
    for body in (request(server.name, prompt="long " * 780_000), b'{"prompt": "' * 320_000):
        await ask(server.port, body)


async def long_answers(server: Server) -> None:
    await ask(server.port, request(server.name, prompt="1", max_tokens=server.longest - 8, n=4, stream=True))


async def unread_streams(server: Server) -> None:
    await ask(server.port, request(server.name, prompt="1", max_tokens=2000, stream=True), read=False)


async def slow_senders(server: Server) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        for byte in b"POST /v1/completions HTTP/1.1\r\nHost: ":
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.5)
    finally:
        writer.transport.abort()  # type: ignore[attr-defined]


HOSTILE: tuple[Callable[[Server], Awaitable[None]], ...] = (long_bodies, long_answers, unread_streams, slow_senders)


async def hostile(server: Server, number: int) -> None:
    """The same again and again, whatever the server says to it."""
    while True:
        with suppress(OSError, ValueError, IndexError):
            await HOSTILE[number % len(HOSTILE)](server)
        await asyncio.sleep(0.2)


async def run_block(server: Server, clients: int, seconds: float, with_hostile: bool) -> Block:
    """The same number of honest clients in blocks of both kinds."""
    block, enemies = Block(with_hostile), clients // 4
    end = time.monotonic() + seconds
    against = [asyncio.create_task(hostile(server, i)) for i in range(enemies if with_hostile else 0)]
    await asyncio.gather(*(honest(server, block, end, i) for i in range(clients - enemies)))
    for task in against:
        task.cancel()
    await asyncio.gather(*against, return_exceptions=True)
    # What the hostile left behind is not to count as the next block's.
    await asyncio.sleep(2)
    return block


def figures(blocks: list[Block]) -> dict:
    seconds = sorted(second for block in blocks for second in block.seconds)
    failures = [failure for block in blocks for failure in block.failures]
    cuts = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else [float("nan")] * 99
    return {
        "answered": len(seconds),
        "failed": len(failures),
        "failures": failures[:5],
        "p50_s": cuts[49],
        "p95_s": cuts[94],
        "p99_s": cuts[98],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct", metavar="DIR")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="of all blocks together (default: 60)")
    parser.add_argument("--blocks", type=int, default=6, help="half of them with hostile clients (default: 6)")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--limit-mib", type=int, default=2000, help="address space of the server (default: 2000)")
    parser.add_argument("--factor", type=float, default=2.0, help="that p95 may grow by (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        server = Server(make_model(Path(directory), options.tokenizer), options.limit_mib, options.rows)
        print(server.line)
        try:
            each = options.seconds / options.blocks
            asyncio.run(run_block(server, options.clients, min(5.0, each), False))
            blocks = [asyncio.run(run_block(server, options.clients, each, i % 2 == 1)) for i in range(options.blocks)]
        finally:
            server.stop()
    found = {kind: figures([b for b in blocks if b.hostile == (kind == "hostile")]) for kind in ("honest", "hostile")}
    ratio = found["hostile"]["p95_s"] / found["honest"]["p95_s"]
    print(f"{'clients':24} {'answered':>8} {'failed':>6} {'p50 s':>8} {'p95 s':>8} {'p99 s':>8}")
    for kind, name in (("honest", "honest alone"), ("hostile", "with hostile ones")):
        row = found[kind]
        cells = " ".join(f"{row[cut]:8.3f}" for cut in ("p50_s", "p95_s", "p99_s"))
        print(f"{name:24} {row['answered']:8} {row['failed']:6} {cells}")
        for failure in row["failures"]:
            print(f"  {failure}")
    print(f"p95 with hostile ones: {ratio:.2f} times that without")
    if options.json:
        settings = {key: str(value) for key, value in vars(options).items()}
        options.json.write_text(
            json.dumps({"settings": settings, "server": server.line, "ratio": ratio, **found}, indent=1)
        )
    return int(ratio > options.factor or found["honest"]["failed"] + found["hostile"]["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
