"""Every setting of every run. One dataclass per group; the doc of a field stands under it, its `Rules` beside it.

Sections that change results are part of a stage's identity (config/identity.py); `parallel`, `tracker`, `cluster`
and fields that are marked so are not: they change how a result is computed, not what it is.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from ..objectives.advantages import ADVANTAGES, CHARGES
from ..objectives.depth import CREDITS, DEPTH_COSTS
from ..objectives.distillation import GATE_TARGETS
from ..objectives.divergences import KL_DIRECTIONS, TEACHERS
from ..objectives.policy_gradient import IMPORTANCE, KL_TERMS, RATIOS, SURROGATES
from ..objectives.schedules import DECAYS
from ..objectives.weights import AVERAGES

SEQUENCE_MULTIPLE = 8
"""A micro-batch's positions are padded to a multiple of this, which parallel.sequence_parallel shares out."""


@dataclass(frozen=True)
class Rules:
    """What a field's type cannot say: its range (config/validate.py) and whether it changes results (identity.py)."""

    choices: Collection[str] = ()
    positive: bool = False
    at_least: float | None = None
    share: bool = False
    """From 0 to 1."""
    name: bool = False
    """Becomes part of directories' and jobs' names."""
    free_text: bool = False
    """May hold line ends and other characters that don't print."""
    path: bool = False
    """A file or directory: other spellings of the same are equal."""
    execution: bool = False
    """Changes how a result is computed, not what it is."""
    part: str = ""
    """The part of a stage's identity that it belongs to, where that is not its section's."""
    only_with: str = ""
    """It changes results only where this switch of its section is on."""
    added_later: bool = False
    """Added when there were results: its default changes nothing and stays out of the identity."""


def setting(default: Any, **rules: Any) -> Any:
    """A field of a section: its default, a list too, and its `Rules`."""
    return field(default_factory=lambda: copy.copy(default), metadata={"rules": Rules(**rules)})


def settings(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Rules]]:
    """(dotted key, value, rules) of every field of a section and of the sections in it."""
    for entry in fields(section):
        value = getattr(section, entry.name)
        if is_dataclass(value):
            yield from settings(value, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", value, entry.metadata.get("rules", Rules())


@dataclass
class ModelConfig:
    path: str = setting("???", path=True)
    """Hugging Face model directory: config.json, safetensors, tokenizer; where weights are drawn by pretrain,
    config.json only; with model.checkpoint, config.json and tokenizer."""
    checkpoint: str = setting("", path=True, added_later=True)
    """Megatron checkpoint, of Megatron-LM, Megatron-Bridge or `convert import`, whose weights are taken; name an
    iteration where several are saved."""
    dtype: str = setting("auto", choices=("auto", "float32", "bfloat16"))
    """float32, bfloat16 or auto: bfloat16 on a GPU and on a CPU that multiplies it (AMX, AVX512-BF16), float32 on other
    CPUs."""
    base_unchecked: bool = setting(False, execution=True)
    """Let policies (start, evaluate.control_policy, a stage's own checkpoints) run on a model they weren't made on."""


@dataclass
class ParallelConfig:
    tensor: int = setting(1, positive=True)
    pipeline: int = setting(1, positive=True)
    data: int = setting(1, positive=True)
    """Ranks = tensor * pipeline * data."""
    virtual: int = setting(1, positive=True)
    """Stages per pipeline rank; more than 1: interleaved schedule, fewer idle ranks at the start and end of a step."""
    stage_layers: list[int] = setting([])
    """Layers per stage (pipeline * virtual of them); empty: boundaries at the exits nearest to an even split."""
    sequence_parallel: bool = False
    tokens_per_micro_batch: int = setting(2048, positive=True)
    """Sequences are packed into micro-batches of at most so many positions, prompts that they share counted once; one
    that is longer has a micro-batch for itself."""
    attention: str = setting("auto", choices=("auto", "blocks"))
    """How packed sequences attend: auto (PyTorch's compiled FlexAttention on a GPU, else blocks) or blocks (products of
    some queries by their keys, in plain PyTorch; where compiling fails)."""
    recompute: bool = False
    """Recompute every layer in the backward pass instead of storing its activations."""
    timeout_s: int = setting(1800, positive=True)
    """Deadline of every collective, and the longest that rank 0 may give no sign of life while the others wait for
    what it does alone (rollouts, checkpoints); how long that takes is for its own deadlines. Seconds."""


@dataclass
class ExitsConfig:
    depths: list[int] = setting([])
    """Exit depths (layers run); empty: every fifth layer and the stage boundaries."""
    gate_width: int | float = setting(2, positive=True)
    """Hidden width of a gate in units of the model's hidden size; .25, say, where gates are most of what is trained."""
    gate_input: str = setting("normalised", choices=("normalised", "raw"))
    """normalised (residual stream over its root mean square) or raw (the paper's)."""
    first_token: bool = setting(False, added_later=True)
    """The prompt's last position, which predicts the first generated token, may exit as those of later tokens do; the
    prompt's others never exit."""

    def __post_init__(self) -> None:
        # 2.0 is the same setting as 2, and has the same name for its results.
        if isinstance(self.gate_width, float) and self.gate_width.is_integer():
            self.gate_width = int(self.gate_width)


@dataclass
class AdapterConfig:
    full: bool = False
    """Full fine-tuning: every weight of the model is trained, there are no adapters, the other fields are not used."""
    rank: int = setting(32, at_least=0)
    alpha: float = setting(32.0, positive=True)
    dropout: float = 0.0
    """Only in calibration and teacher training; 0 keeps learner and rollouts exactly alike."""
    targets: str = setting("all", choices=("attention", "all"))
    """attention (q, k, v, o, the paper's) or all (MLP too)."""


@dataclass
class TaskConfig:
    name: str = setting(
        "arithmetic", choices=("arithmetic", "gsm8k", "tom", "hops", "sums", "reasoning_gym", "dataset", "jsonl")
    )
    """arithmetic, tom, hops and sums (built in), reasoning_gym, gsm8k or dataset (also: jsonl); docs/tasks.md describes
    them."""
    families: list[str] = setting(["product", "sum", "word"])
    """arithmetic: product, sum, word, chain; tom: first_order, second_order, true_belief, reality, memory;
    hops and sums: hop1 to hop8 and hop1 to hop4, as far as task.slots; reasoning_gym: names of its families,
    chain_sum for one."""
    operands: str = setting("small", choices=("small", "wide"), added_later=True)
    """arithmetic: which numbers. Of small ones there are few pairs (66 products), so that many problems on them are
    worth less than their number; wide ones are harder, and most test problems have a pair of their own."""
    tokens_per_step: int = setting(1, positive=True, added_later=True)
    """hops: tokens of a written step."""
    slots: int = setting(4, positive=True, added_later=True)
    """hops and sums: most hops of a problem; of hops, operations that a prompt has room for."""
    path: str = ""
    """gsm8k and dataset: a .jsonl or .parquet file, a directory with such files for each split, or a data set that
    `datasets` saved to disk."""
    question_column: str = "question"
    """gsm8k and dataset, like all columns and splits here. Dots lead into nested columns: extra.question."""
    answer_column: str = "answer"
    """The reference, or steps that end in "#### reference" or \\boxed{reference}."""
    choices_column: str = ""
    """A list of options, shown with letters; the answer is a letter, an option's text or its number. Empty: none."""
    train_split: str = "train"
    evaluation_split: str = "test"
    """Empty: evaluation problems are taken from the train split too."""
    train: int = setting(0, at_least=0)
    """Training problems; 0: all there are."""
    validation: int = setting(200, positive=True)
    evaluation: int = setting(400, positive=True)
    verifier_deadline_s: float = setting(5.0, positive=True, execution=True)


@dataclass
class PretrainConfig:
    enabled: bool = False
    """true: before anything else all weights are trained on the task's worked problems, question and answer."""
    init: str = setting("random", choices=("random", "model"), added_later=True)
    """What is trained: weights drawn at random for the shape in model.path's config.json, or the model that is
    there."""
    layers: int = setting(0, at_least=0, added_later=True)
    """Layers of a random model instead of config.json's; 0: as it says."""
    width: int = setting(0, at_least=0, added_later=True)
    """Hidden size instead of config.json's: MLP and number of heads in proportion, heads as large as they were."""
    steps: int = setting(1000, positive=True)
    batch_size: int = setting(64, positive=True)
    """Sequences per update."""
    learning_rate: float = setting(3e-3, positive=True)
    checkpoint_every: int = setting(200, positive=True, execution=True)
    seed: int = setting(0, at_least=0)
    """Decides random weights and the order of the problems."""


@dataclass
class TeacherConfig:
    enabled: bool = True
    """false: the model at model.path, or the one that is pretrained, is the teacher as it is."""
    shots: int = setting(4, at_least=0)
    problems: int = setting(330, positive=True)
    samples: int = setting(4, positive=True)
    epochs: int = setting(4, positive=True)
    batch_size: int = setting(16, positive=True)
    learning_rate: float = setting(5e-4, positive=True)


@dataclass
class TracesConfig:
    problems: int = setting(1150, positive=True)
    temperature: float = setting(0.7, positive=True)
    only_correct: bool = False
    wide_operands: float = setting(0.0, share=True, added_later=True)
    """arithmetic on small operands: share of the problems whose operands are wide. Calibration asks for no right
    answer, so it may see more pairs than the task has."""


@dataclass
class CalibrateConfig:
    epochs: float = setting(2.0, positive=True)
    patterns: int = setting(4, positive=True)
    """S: exit patterns drawn per sequence and epoch."""
    batch_size: int = setting(32, positive=True)
    """Sequences (traces x patterns) per update."""
    kl_factor: float = setting(1.0, positive=True)
    """c in s* = 2(1 - sigmoid(c d))."""
    kl_direction: str = setting("student_teacher", choices=KL_DIRECTIONS)
    """student_teacher, teacher_student or jensen_shannon."""
    teacher: str = setting("topk", choices=TEACHERS)
    """What the student is compared with: topk (the traces' most probable tokens and one lumped tail) or full (the whole
    distribution, recomputed by the learner, which costs a forward pass)."""
    gate_targets: str = setting("sampled", choices=GATE_TARGETS)
    """sampled (negative log-likelihood of the drawn exit), soft (cross-entropy to the target hazards of the traces) or
    current (cross-entropy, for the exit taken, to the target of the student's own divergence there and now)."""
    student_patterns: float = setting(0.0, share=True)
    """Share of the updates, at the end, whose patterns come from the student's own gates instead of the traces' target
    hazards, under a threshold drawn for each sequence from [0.5, 1): so it learns to read what it has left early as
    context. Costs a scoring pass."""
    uniform_patterns: float = setting(0.0, share=True)
    """Share of patterns drawn uniformly over the exits instead: trains shallow readouts too."""
    full_patterns: float = setting(0.0, share=True, added_later=True)
    """Share of patterns without any exit: holds the answers at full depth, which the others hardly train."""
    depth_power: float = setting(0.0, at_least=0)
    """The KL of a position counts (exit depth / L) to this power: hopeless shallow exits pull less at the adapters."""
    reach: float = setting(0.0, at_least=0, added_later=True)
    """Nats within which a shallow exit isn't hopeless: for a share exp(-KL / reach) its KL counts as at full depth,
    whatever depth_power says. 0: for none. Costs a scoring pass, which gate_targets=current has made already."""
    keep: float = setting(1.0, share=True)
    """Share of the change of the weights that is kept when the adapters' training ends (WiSE-FT): less of it, less is
    forgotten of what the traces don't hold."""
    settle: float = setting(0.0, share=True)
    """Share of the updates, at the end, after `keep` has been applied, that train the gates alone."""
    adapter_lr: float = setting(1e-3, at_least=0)
    gate_lr: float = setting(1e-3, at_least=0)
    gate_weight: float = setting(1.0, at_least=0)
    checkpoint_every: int = setting(20, positive=True, execution=True)
    seed: int = setting(0, at_least=0)


@dataclass
class RLConfig:
    steps: int = setting(12, positive=True)
    prompts_per_step: int = setting(16, positive=True)
    group_size: int = setting(4, positive=True)
    """K rollouts per prompt."""
    temperature: float = setting(1.0, positive=True)
    lambda_exit: float = setting(0.5, at_least=0)
    """Price of depth: reward falls by lambda times what an answer's depth costs. accuracy_floor leads from there."""
    lambda_warmup: float = setting(0.0, share=True)
    """Share of the steps over which the price rises linearly from 0. accuracy_floor compares and leads after them."""
    depth_cost: str = setting("mean", choices=DEPTH_COSTS)
    """What an answer's depth costs: mean (of depth/L over its tokens), total (sum, divided by cost_length) or max (over
    the tokens that may exit)."""
    cost_length: int = setting(32, positive=True)
    """Tokens that total depth and lambda_length count in."""
    lambda_length: float = setting(0.0, at_least=0, added_later=True)
    """Price of length: reward falls by it for every cost_length tokens."""
    charge: str = setting("all", choices=CHARGES, added_later=True)
    """Which answers pay for depth and length: all, or right ones only. Under all, a group without a right answer is
    rewarded for being shallow."""
    credit: str = setting("answer", choices=CREDITS)
    """What teaches an exit: answer (its answer's reward, as in the paper), token (of the answer's depth that from it on
    only) or exit (what it costs itself: lambda times its depth and beta times exit_kl times the divergence at its
    token, against going on at that gate). The longer the answers the more of answer's and token's signal is noise."""
    exit_task: float = setting(0.1, at_least=0, added_later=True)
    """With credit=exit: weight of the task's advantage on the answer's exits."""
    exit_kl: float = setting(1.0, at_least=0, added_later=True)
    """With credit=exit: weight of the divergence at an exit, beside beta."""
    exit_divergence: str = setting("taken", choices=("taken", "all"), added_later=True)
    """With credit=exit: where divergences are known. taken: at the exits that tokens took; for a token that went on,
    firing costs the mean over those that fired with about the same hazard. all: at every exit that a token came by; the
    pool reads the rollouts once more."""
    token_depth: float = setting(1.0, at_least=0, added_later=True)
    """With credit=exit: weight of the depth's advantage on the answer's tokens. 0: what is written doesn't answer for
    the depth that it takes."""
    fixed_depth: int = setting(0, at_least=0, added_later=True)
    """Every token of an answer leaves at this depth, an exit or L, and no gate learns; 0: gates decide."""
    families: list[str] = setting([], added_later=True)
    """Answer problems of these of the task's families only; empty: all."""
    wide_operands: float = setting(0.0, share=True, added_later=True)
    """As traces.wide_operands, for the problems that are answered: the divergence from the reference teaches on them,
    the reward where an answer is right."""
    accuracy_floor: float | None = setting(None, added_later=True)
    """Percentage points that accuracy may fall below the reference's: lambda then rises while there are some left and
    falls when there are none. null: lambda stays what it is."""
    accuracy_window: int = setting(8, positive=True, added_later=True)
    """Steps that accuracy_floor's running means cover, of the policy and of the reference on the same prompts. Until so
    many have been compared they move lambda by their share of it."""
    accuracy_samples: int = setting(4, at_least=0, added_later=True)
    """With accuracy_floor: answers of the reference to each prompt that is compared, made before the first step. 0: as
    many as group_size to the prompts of the first accuracy_window steps compared, and their mean for all others:
    cheaper, and good enough where a step has so many prompts that all steps are about as hard."""
    lambda_rate: float = setting(0.5, at_least=0, added_later=True)
    """With accuracy_floor: what lambda gains or loses for good in a step, per unit of accuracy (1 = 100 points)."""
    beta: float = setting(0.05, at_least=0)
    """Weight of KL(policy || reference)."""
    kl: str = setting("reward", choices=KL_TERMS)
    """reward (k1 estimate, subtracted from the reward), loss (k3 estimate, added to the loss) or exact (over the whole
    vocabulary, added to the loss: every token teaches, at the price of another pass of the reference)."""
    kl_sum: bool = setting(False, added_later=True)
    """With kl=reward: the estimate is the sum over an answer's tokens, as in E[reward] - beta KL, not their mean. Of
    answers of different length the longer one is then held to the reference at each token as much as the shorter."""
    advantage: str = setting("rloo", choices=ADVANTAGES)
    """rloo, mean, grpo or none."""
    surrogate: str = setting("ppo", choices=SURROGATES, added_later=True)
    """What the loss does with the ratio to the policy at the start of the step: ppo (a clipped ratio per position,
    token and exit together) or gspo (one per answer, the geometric mean over its positions; `clip` is then far smaller,
    3e-4 in its paper)."""
    ratios: str = setting("together", choices=RATIOS, added_later=True)
    """Ratios of token and exit: together (their product weighs and clips both) or apart (each its own)."""
    importance: str = setting("truncate", choices=IMPORTANCE, added_later=True)
    """What the importance ratio learner/rollout does: truncate (cut at importance_cap), mask (left out outside
    importance_floor to importance_cap) or none."""
    importance_cap: float = setting(2.0, positive=True)
    importance_floor: float = setting(0.5, at_least=0, added_later=True)
    """With importance=mask."""
    loss_average: str = setting("answer", choices=AVERAGES, added_later=True)
    """The loss is a mean over each answer, then over answers (answer), over all tokens (token), or a sum over each
    answer divided by rollout.max_new_tokens (constant). Under answer a token of a long answer counts less."""
    overlong: str = setting("verdict", choices=("verdict", "filter"), added_later=True)
    """Answers cut at rollout.max_new_tokens: as the verifier finds them (verdict) or left out (filter)."""
    skip_scoring: bool = setting(False, added_later=True)
    """Learn from a step's rollouts without scoring them first. Only where the objective asks for nothing that they
    don't bring along: one update a step, importance=none, no staleness, no divergence but an exact one of tokens or,
    with exit_divergence=all, those of exits."""
    epochs: int = setting(1, positive=True)
    """Passes over a step's rollouts."""
    minibatches: int = setting(1, positive=True)
    """Updates per pass."""
    clip: float = setting(0.2, at_least=0)
    """PPO: a position whose ratio to the policy at the start of the step has left 1 +- clip in its advantage's
    direction no longer counts; 0: never. Without effect on the first update of a step."""
    clip_high: float = setting(0.0, at_least=0, added_later=True)
    """The upper bound apart from the lower one (clip-higher); 0: the same."""
    drop_equal_groups: bool = False
    """Leave out prompts whose answers all got the same task reward, unless right ones among them pay for depth."""
    decay: str = setting("constant", choices=DECAYS)
    """Learning rate after warm-up: constant, linear or cosine, to a tenth at the last update."""
    dump_rollouts: bool = setting(False, execution=True)
    """Keep every step's rollouts in the stage's rollouts/ directory."""
    replay: str = ""
    """Train on the rollouts of this directory, as dumped, instead of a pool's."""
    gate_centre: float = 0.5
    gate_sharpness: float = 1.0
    """The gates that RL starts from have their logits z replaced by sharpness * (z - logit(centre)): what a threshold
    at `gate_centre` decides is then what sampling mostly does. 0.5 and 1 change nothing."""
    adapter_lr: float = setting(3e-4, at_least=0)
    gate_lr: float = setting(1e-3, at_least=0)
    checkpoint_every: int = setting(1, positive=True, execution=True)
    seed: int = setting(0, at_least=0)


@dataclass
class RolloutConfig:
    backend: str = setting("ray", choices=("ray", "vllm", "local"), execution=True)
    """ray (the embedded engine, actors in their own processes), vllm (the same actors, in each a vLLM with exits) or
    local (the embedded engine in process)."""
    vllm_python: str = setting(".venv-vllm/bin/python", path=True, execution=True)
    """backend=vllm: the interpreter of the environment that has it (`make vllm`)."""
    vllm_compile: bool = setting(True, execution=True)
    """backend=vllm: compile the model when an actor starts, on a GPU with CUDA graphs; else it runs eagerly."""
    vllm_exits: str = setting("masked", choices=("masked", "compact"), execution=True)
    """backend=vllm: masked (every position runs all layers; one that has left keeps its stream) or compact (it runs
    keys and values alone in deeper layers; needs vllm_compile=false)."""
    tensor: int = setting(1, positive=True, execution=True)
    """backend=vllm: devices of an actor, which tensor parallelism shares the model among."""
    actors: int = setting(1, positive=True, execution=True)
    threads: int = setting(2, positive=True, execution=True)
    """Torch threads per actor on a CPU."""
    rows: int = setting(128, positive=True, execution=True)
    """Sequences in flight per actor."""
    cache_gib: float = setting(0.0, at_least=0, execution=True)
    """Most memory of an actor's key-value cache, GiB on each of its devices; rows that don't fit wait. 0: as much as
    the rows take or, with backend=vllm, what is left of nine tenths of a GPU (on a CPU 1 GiB)."""
    device_share: float = setting(1.0, positive=True, execution=True)
    """Share of a GPU (of a core, on a CPU) that Ray reserves for an actor; several actors share a device below 1."""
    max_staleness: int = setting(0, at_least=0, part="freshness")
    """RL: versions of the weights that rollouts may be behind. 0: synchronous; more: they are made while the learner
    trains."""
    sync_dtype: str = setting("float32", choices=("float32", "bfloat16"), part="freshness")
    """What weights travel to the pool in: float32 or bfloat16 (half the bytes; gates only to a bfloat16 decoder)."""
    check_weights: bool = setting(False, execution=True)
    """Compare every tensor on both sides after every sync."""
    max_new_tokens: int = setting(48, positive=True)
    stop: list[str] = setting(["\n"], free_text=True)
    prompt_template: str = setting("plain", choices=("plain", "chat"))
    """plain (Question: ... Answer:) or chat (the tokenizer's chat template)."""
    timeout_s: float = setting(0.0, at_least=0, execution=True)
    """Deadline of a call on an actor (a chunk of answers or traces, a new version of the weights), seconds; 0: ten
    minutes and a quarter of a second per token of max_new_tokens. An actor may take as long to start, and at least
    three minutes, three more where vLLM compiles, and one second per 100 MB of weights to read."""
    failure_budget: int = setting(3, at_least=0, execution=True)
    """Actor deaths after which a run stops."""


@dataclass
class EvaluateConfig:
    thresholds: list[float] = setting([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    """Hazard thresholds tried on the validation split."""
    tolerance: float = setting(0.02, at_least=0)
    """Chosen: the least depth whose validation accuracy is within this of the best."""
    wide_problems: int = setting(0, at_least=0, added_later=True)
    """arithmetic on small operands: up to so many validation problems on wide ones, on which a threshold is chosen,
    too. Small ones have few pairs that are held out (8 products): what an exit costs the others doesn't show."""
    wide_test: int = setting(0, at_least=0, added_later=True)
    """arithmetic on small operands: up to so many problems on wide ones of the split that is measured, on which every
    model is measured, too, at full depth and at its threshold. Answers on one pair are right or wrong together, and
    these have more pairs."""
    answers: int = setting(12, at_least=0)
    """Answers kept token by token for the report."""
    controls: bool = setting(False, only_with="controls")
    """Compare the last model with exit rules that know less, at its mean depth and at its accuracy; up to 28 readings
    of the validation split and 2 of the test split per rule (docs/evaluation.md)."""
    control_policy: str = setting("", path=True, only_with="controls")
    """With controls, one more of them: the gates of another run, by its policy checkpoint or rl stage directory, as of
    one with rl.lambda_exit=0 or at full depth (rl.fixed_depth)."""
    externalisation: bool = setting(False, only_with="externalisation")
    """Measure how much of its reasoning each model writes down; about as much as 12 evaluations of
    externalisation_prompts problems per model (docs/evaluation.md)."""
    externalisation_prompts: int = setting(100, at_least=0, only_with="externalisation")
    """Test problems for that; 0: all."""
    choice: str = setting("", choices=("", "reinforced", "all"), added_later=True)
    """Tasks with styles: which one a model answers in, and what each costs it, sampled as RL samples. Of the last model
    (reinforced), or also of the teacher and of the policy that RL starts from (all)."""
    choice_answers: int = setting(300, positive=True, only_with="choice", added_later=True)
    """Sampled answers for that, per family and condition."""


@dataclass
class DeepspeedConfig:
    zero_stage: int = setting(1, execution=True)
    """What data-parallel ranks share out: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too (only with
    parallel.tensor = parallel.pipeline = 1)."""
    offload_optimizer: bool = setting(False, execution=True)
    """Optimizer state in CPU memory; needs zero_stage >= 1."""
    gradient_clipping: float = setting(1.0, at_least=0)
    """Largest gradient norm; 0: not clipped."""
    eps: float = setting(1e-8, positive=True)
    weight_decay: float = setting(0.0, at_least=0)


@dataclass
class TrackerConfig:
    wandb: str = setting("auto", choices=("auto", "online", "offline", "disabled"))
    """auto (what WANDB_MODE says, else online with a key, else offline), online, offline or disabled."""


@dataclass
class ClusterConfig:
    nodes: int = setting(1, positive=True)
    """Nodes of a job, all together."""
    gpus_per_node: int = setting(0, at_least=0)
    """0: nodes without GPUs."""
    rollout_nodes: int = setting(0, at_least=0)
    """The last of the nodes, which run rollout actors only; 0: actors share the learner's nodes."""
    requeue_limit: int = setting(20, at_least=0)
    """How often a job that was stopped (time limit, preemption, lost node) goes back into the queue by itself."""


@dataclass
class RunConfig:
    name: str = setting("???", name=True)
    """Results go to <runs>/<name>/<stage>-<hash of what the stage depends on>."""
    runs: str = "runs"
    device: str = setting("auto", choices=("auto", "cpu", "cuda"))
    """cpu; cuda, refused where there is none; or auto: cuda where there is one, and refused like it in a cluster whose
    nodes have GPUs (cluster.gpus_per_node)."""
    deterministic: bool = False
    """Only deterministic kernels, where a GPU has a choice (slower). On a CPU a seed always gives the same metrics."""
    start: str = ""
    """rl, evaluate: a policy checkpoint to use instead of this configuration's own calibration."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    exits: ExitsConfig = field(default_factory=ExitsConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    traces: TracesConfig = field(default_factory=TracesConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    deepspeed: DeepspeedConfig = field(default_factory=DeepspeedConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
