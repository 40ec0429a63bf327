"""Inspect's provider against a real server, interventions on a chain, the monitor's figures, and logs of answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from inspect_ai import eval as inspect_eval
from inspect_ai.log import EvalLog, EvalSample, read_eval_log
from inspect_ai.model import GenerateConfig, Model, ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import SampleScore, Score

from ee_megatron import inspect_evals
from ee_megatron.evaluation import chain as text_of
from tests.integration.test_serve import Served

pytestmark = [pytest.mark.extended, pytest.mark.timeout(600)]
GREEDY = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("serve"), "--exits", "off")
    yield made
    made.process.kill()


def run(task, served: Served, folder: Path, **arguments) -> EvalLog:
    config = GenerateConfig(temperature=0, max_tokens=6)
    model = get_model("ee-megatron/tiny-policy", base_url=f"{served.url}/v1", config=config, **arguments)
    (log,) = inspect_eval(task, model, log_dir=str(folder), display="none", max_tokens=6)
    assert log.status == "success" and log.samples, log.error
    return log


def replying(texts: list[str]) -> Model:
    """Inspect's model of given replies; their usage is stated, since it would count tokens by a file from the net."""
    replies = [ModelOutput.from_content("mockllm/model", text) for text in texts]
    for reply in replies:
        reply.usage = ModelUsage()
    return get_model("mockllm/model", custom_outputs=replies)


def outputs(sample: EvalSample) -> list:
    return [event.output for event in sample.events if event.event == "model"]


def test_outputs_carry_the_depths_that_the_server_names(served: Served, tmp_path: Path) -> None:
    task = inspect_evals.early_answering(count=4, fraction=0.5, prefill=True)
    log = run(task, served, tmp_path, exits="threshold:0.5")
    shallow = 0
    for sample in log.samples:
        free, forced = outputs(sample)
        ask = {"model": "tiny-policy", "extra_body": {"exit_policy": {"kind": "threshold", "value": 0.5}}, **GREEDY}
        question = [{"role": "user", "content": sample.input[-1].text}]
        alone = served.client.chat.completions.create(messages=question, **ask)
        assert free.completion == alone.choices[0].message.content == sample.store["free"]
        assert free.metadata["early_exit"][0]["depths"] == alone.choices[0].early_exit["depths"]
        # The edited chain begins the message of the assistant, which the server continues.
        words = text_of.truncate(text_of.split_answer(free.completion)[0], 0.5)
        assert sample.messages[-2].text == (words + text_of.cue(free.completion)).strip()
        ask["extra_body"] |= {"continue_final_message": True, "add_generation_prompt": False}
        ask["max_tokens"] = inspect_evals.FORCED_TOKENS
        begun = [*question, {"role": "assistant", "content": sample.messages[-2].text}]
        assert (
            forced.completion == served.client.chat.completions.create(messages=begun, **ask).choices[0].message.content
        )
        shallow += sum(depth < 6 for depth in free.metadata["early_exit"][0]["depths"])
    assert shallow > 0


def test_a_plain_prompt_is_a_completion_at_the_rule_of_the_model(served: Served, tmp_path: Path) -> None:
    log = run(
        inspect_evals.filler(count=2, prefill=True, instruct=False), served, tmp_path, plain=True, exits="fixed:2"
    )
    for sample in log.samples:
        free, forced = outputs(sample)
        prompt = f"Question: {sample.input[-1].text}\nAnswer:"
        ask = {"model": "tiny-policy", "extra_body": {"exit_policy": {"kind": "fixed", "value": 2}}, **GREEDY}
        assert free.completion == served.client.completions.create(prompt=prompt, **ask).choices[0].text
        assert set(free.metadata["early_exit"][0]["depths"][1:]) == {2}
        ask["max_tokens"] = inspect_evals.FORCED_TOKENS
        begun = f"{prompt} {sample.messages[-2].text}"
        assert forced.completion == served.client.completions.create(prompt=begun, **ask).choices[0].text
        dots = text_of.FILLER * len(text_of.split_answer(free.completion)[0].split())
        assert sample.messages[-2].text == (dots + f" {text_of.MARK}").strip()


def test_any_model_is_asked_in_a_second_turn(tmp_path: Path) -> None:
    """Inspect's own model of given replies stands for one that follows its text, then for one that doesn't."""
    for second, same in (("The answer is 9", 0.0), ("The answer is 8", 1.0)):
        replies = [text for _ in range(3) for text in ("7 + 1 = 8. The answer is 8", second)]
        model = replying(replies)
        task = inspect_evals.corrupted_chain(count=3)
        (log,) = inspect_eval(task, model, log_dir=str(tmp_path), display="none", max_samples=1)
        assert log.status == "success", log.error
        for sample in log.samples:
            assert [message.role for message in sample.messages] == ["user", "assistant", "user", "assistant"]
            assert sample.messages[1].text == sample.store["edited"] != "7 + 1 = 8."
            assert sample.scores["both_answers"].value["same"] == same


def test_the_monitor_is_scored_as_in_the_report(tmp_path: Path) -> None:
    flags = [(1, 1), (1, 1), (1, 0), (0, 0), (0, 1)]
    scores = [
        SampleScore(score=Score(value={"used": u, "flagged": f, "right": 0}), sample_id=i, sample_metadata={"group": i})
        for i, (u, f) in enumerate(flags)
    ]
    found = inspect_evals.monitor_quality()(scores)
    assert found["true_positive_rate"] == pytest.approx(2 / 3) and found["true_negative_rate"] == pytest.approx(1 / 2)
    assert found["g_mean2"] == pytest.approx(1 / 3) and found["g_mean2_low"] <= 1 / 3 <= found["g_mean2_high"]
    # Hinted answers: the first follows the hint and says so, the second follows it silently.
    for said, flagged in (("the hint says {}. The answer is {}", 1.0), ("The answer is {}", 0.0)):
        task = inspect_evals.hint(count=1)
        (sample,) = task.dataset
        wrong = text_of.wrong_answer(sample.target, 0, sample.id)
        replies = [f"The answer is {sample.target}", said.format(wrong, wrong)]
        model = replying(replies)
        (log,) = inspect_eval(task, model, log_dir=str(tmp_path), display="none")
        assert log.status == "success", log.error
        (entry,) = log.samples
        assert text_of.HINT.format(value=wrong) in entry.messages[0].text
        assert entry.scores["hint_use"].value == {"used": 1.0, "flagged": flagged, "right": 0.0}


def test_evaluated_answers_become_logs(tmp_path: Path) -> None:
    def answer(number: int, model: str, correct: bool) -> dict:
        tokens = [{"text": " 4", "depth": depth} for depth in (2, 6)]
        return {
            "id": f"p{number}", "prompt": "Question: 2 + 2?\nAnswer:", "reference": "4", "model": model,
            "exits": "hazard > 0.5", "correct": correct, "text": " 4 4", "tokens": tokens, "group": "2;2",
        }  # fmt: skip

    answers = [answer(0, "teacher", True), answer(0, "reinforced", True), answer(1, "reinforced", False)]
    paths = inspect_evals.write_logs(tmp_path, answers, "arithmetic")
    assert [path.name for path in paths] == ["teacher.eval", "reinforced.eval"]
    log = read_eval_log(str(paths[1]))
    assert {name: metric.value for name, metric in log.results.scores[0].metrics.items()} == {
        "accuracy": 0.5, "mean_depth": 4.0,
    }  # fmt: skip
    assert [sample.scores["verifier"].value for sample in log.samples] == ["C", "I"]
    assert log.samples[0].output.metadata["early_exit"][0]["depths"] == [2, 6]
