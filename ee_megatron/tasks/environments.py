"""Environments of the library verifiers (Prime Intellect), by id: tasksets of `verifiers.v1`, scored by their own
rewards. Single turns only, with rewards that need nothing but the text."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
from collections.abc import Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from ..config.fields import environment
from ..config.schema import TaskConfig
from ..types import Prompt
from .answers import answer_part
from .base import FAMILY_LIMIT, ChatTemplate, Problem, Split, Task, Verdict, register
from .dataset import DatasetTask, _group, _turns


@register("verifiers")
class VerifiersTask(DatasetTask):
    """The environment `task.path`, its problems divided as a file's are. There are no worked examples: only the rewards
    know the form of an answer."""

    def __init__(self, task: TaskConfig, chat: ChatTemplate | None = None) -> None:
        Task.__init__(self, task, None, chat)
        self.name, self.path, self.scorer = task.name, Path(task.path), f"task.path={task.path}"
        self._entries: dict[str, Any] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        package = environment(task.path)
        for name, how in (("verifiers", "pip install verifiers"), (package, f"prime env install {task.path}")):
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"{self.scorer}: the package {name} is not installed; {how}")
        asked = sum(size or FAMILY_LIMIT for size in self.sizes.values())
        try:
            problems = self._read_tasks(_tasks(task.path, task.arguments, asked))
        except (Exception, SystemExit) as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(f"{self.scorer}, with verifiers {version('verifiers')}: {said}") from error
        self._divide({"train": problems})
        self._examples = []

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_loop": None}

    def worked(self, split: Split) -> list[tuple[Prompt, str]]:
        raise ValueError(f"{self.scorer}: an environment has no worked examples; set pretrain=null and teacher=null")

    def render(self, question: str, examples: Sequence[Problem] = (), before: Sequence[dict[str, str]] = ()) -> str:
        if self.chat is None:
            return super().render(question, examples, before)
        return self.chat([*before, {"role": "user", "content": question}])

    def warm_up(self) -> None:
        # Before answers come: a loop opens sockets, which a verifier process refuses from then on.
        self._loop = asyncio.new_event_loop()

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """The weighted sum of the environment's rewards, cut to [0, 1]. Raises what they raise."""
        if self._loop is None:
            self.warm_up()
        assert self._loop is not None
        score = min(max(self._loop.run_until_complete(_score(self._entries[prompt.group], text)), 0.0), 1.0)
        return Verdict(correct=score == 1, well_formed=True, answered=True, score=score)

    def _read_tasks(self, tasks: list[Any]) -> list[Problem]:
        """Their problems, in an order that isn't the environment's."""
        problems: dict[str, Problem] = {}
        for number, task in enumerate(tasks, start=1):
            before, question, _ = _turns(f"problem {number}", _messages(task), "")
            group = _group("\n".join([*(message["content"] for message in before), question]))
            answer = str(getattr(task.data, "answer", ""))
            problems[group], self._entries[group] = Problem(question, answer, "", group, before), task
        return [problems[group] for group in sorted(problems)]


def _tasks(name: str, arguments: dict[str, Any], asked: int) -> list[Any]:
    """The environment's tasks. Raises ValueError for what is no single turn that its text alone can be scored by."""
    import verifiers.v1 as vf

    taskset = vf.load_taskset(vf.taskset_config_type(name).model_validate({"id": name, **arguments}))
    # Of an endless one, enough for three splits.
    tasks = list(islice(taskset, 4 * asked if taskset.INFINITE else None))
    if not tasks:
        raise ValueError("has no problems; expected one or more")
    task, config = tasks[0], tasks[0].config
    kind, rewards = type(task), task.hooks("reward")
    runtimes = [inspect.signature(reward).parameters.get("runtime") for reward in rewards]
    has = {
        "agents of its own": vf.environment_class(name) is not vf.SingleAgentEnv or vf.default_harness_id(name) == name,
        "a user of its own": task.data.prompt is None,
        "tools": kind.toolsets(config) or type(taskset).toolsets(taskset.config),
        "a container or runtime": task.NEEDS_CONTAINER or task.data.image or kind.setup is not vf.Task.setup
        or kind.finalize is not vf.Task.finalize or any(p and p.default is p.empty for p in runtimes),
        "a judge": config.judges,
        "no reward": not rewards,
    }  # fmt: skip
    if found := [what for what, there in has.items() if there]:
        raise ValueError(f"has {' and '.join(found)}; expected single turns, scored by their text")
    return tasks


def _messages(task: Any) -> list[dict[str, Any]]:
    asked, system = task.data.prompt, task.data.system_prompt
    asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else [m.model_dump() for m in asked]
    return [*([{"role": "system", "content": system}] if system else []), *asked]


async def _score(task: Any, text: str) -> float:
    import verifiers.v1 as vf
    from verifiers.v1.state import state_cls

    messages = [*_messages(task), {"role": "assistant", "content": answer_part(text) or ""}]
    nodes = [vf.MessageNode(parent=at - 1 if at else None, message=m) for at, m in enumerate(messages)]
    nodes[-1].sampled = True
    trace = vf.Trace(
        task=vf.TraceTask(type=type(task).__name__, data=task.data), agent=vf.AgentInfo(config=vf.AgentConfig()),
        state=state_cls(type(task))(), nodes=nodes, is_completed=True, ok=True,
    )  # fmt: skip
    await task.score(trace)
    return float(trace.reward)
