"""Every setting of every run. One dataclass per section; the doc of a field stands under it, its `Rules` beside it.

A section checks what its fields are together (`clashes`); what several sections are together is in validate.py.
Sections that change results are part of a stage's identity (identity.py); `parallel`, `tracker`, `cluster` and fields
that are marked so are not: they change how a result is computed, not what it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..objectives.advantages import ADVANTAGES, CHARGES
from ..objectives.depth import CREDITS, DEPTH_COSTS
from ..objectives.distillation import GATE_TARGETS
from ..objectives.divergences import KL_DIRECTIONS, TEACHERS
from ..objectives.policy_gradient import IMPORTANCE, KL_TERMS, RATIOS
from ..objectives.schedules import DECAYS, LAMBDA_MAX
from ..objectives.weights import AVERAGES
from .fields import Clash, clash, known, optional, section, setting

SEQUENCE_MULTIPLE = 8
"""A micro-batch's positions are padded to a multiple of this, which parallel.sequence_parallel shares out."""


@dataclass
class ModelConfig:
    path: str = setting(kind="path")
    """Hugging Face model directory: config.json, safetensors, tokenizer; where weights are drawn by pretrain,
    config.json only; with model.checkpoint, config.json and tokenizer."""
    checkpoint: str = setting("", kind="path", added_later=True)
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

    def clashes(self) -> Iterator[Clash]:
        if not 0 <= self.dropout < 1:
            yield clash(f"adapter.dropout={self.dropout}: expected 0 <= dropout < 1", "adapter.dropout")


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
    """Before anything else all weights are trained on the task's worked problems, question and answer."""

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
    """The teacher is trained. null: the model at model.path, or the one that is pretrained, is the teacher as it is."""

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
    exit_samples: int = setting(4, positive=True, was="calibrate.patterns")
    """S: exit patterns drawn per sequence and epoch."""
    batch_size: int = setting(32, positive=True)
    """Sequences (traces x exit_samples) per update."""
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
    kl_scale: float = setting(0.0, at_least=0, added_later=True, was="calibrate.reach")
    """Nats within which a shallow exit isn't hopeless: for a share exp(-KL / kl_scale) its KL counts as at full depth,
    whatever depth_power says. 0: for none. Costs a scoring pass, which gate_targets=current has made already."""
    wise_ft_alpha: float = setting(1.0, share=True, was="calibrate.keep")
    """Share of the change of the weights that is kept when the adapters' training ends (WiSE-FT): less of it, less is
    forgotten of what the traces don't hold."""
    gate_only_fraction: float = setting(0.0, share=True, was="calibrate.settle")
    """Share of the updates, at the end, after `wise_ft_alpha` has been applied, that train the gates alone."""
    adapter_lr: float = setting(1e-3, at_least=0)
    gate_lr: float = setting(1e-3, at_least=0)
    gate_weight: float = setting(1.0, at_least=0)
    checkpoint_every: int = setting(20, positive=True, execution=True)
    seed: int = setting(0, at_least=0)

    def clashes(self) -> Iterator[Clash]:
        if self.uniform_patterns + self.full_patterns > 1:
            yield clash(
                f"calibrate.uniform_patterns={self.uniform_patterns}, calibrate.full_patterns={self.full_patterns}: "
                "shares of the same patterns; expected at most 1 together",
                "calibrate.uniform_patterns calibrate.full_patterns",
            )
        if self.kl_scale and not self.depth_power:
            yield clash(
                f"calibrate.kl_scale={self.kl_scale} with calibrate.depth_power=0: every KL counts in full already; "
                "give a power above 0, 1.5 say, or leave kl_scale out",
                "calibrate.kl_scale calibrate.depth_power",
            )
        if self.wise_ft_alpha < 1 and not self.gate_only_fraction:
            yield clash(
                f"calibrate.wise_ft_alpha={self.wise_ft_alpha}: moves the weights under the gates; give "
                "calibrate.gate_only_fraction, .1 say, for these to learn again",
                "calibrate.wise_ft_alpha calibrate.gate_only_fraction",
            )


@dataclass
class AccuracyTarget:
    """lambda follows the accuracy: it rises while accuracy is above the target, and falls below it."""

    margin: float = setting(was="rl.accuracy_floor", off=None, added_later=True)
    """The target: percentage points below the reference's accuracy on the same prompts."""
    window: int = setting(8, positive=True, added_later=True, was="rl.accuracy_window")
    """Steps that the running means of both accuracies cover. Until so many have been compared, lambda's update is
    scaled by their share of it."""
    samples: int = setting(4, at_least=0, added_later=True, was="rl.accuracy_samples")
    """Answers of the reference to each prompt that is compared, made before the first step. 0: as many as group_size to
    the prompts of the first `window` steps compared, and their mean for all others: cheaper, and good enough where a
    step has so many prompts that all steps are about as hard."""
    rate: float = setting(0.5, at_least=0, added_later=True, was="rl.lambda_rate")
    """What lambda gains or loses for good in a step, per unit of accuracy (1 = 100 points)."""

    def clashes(self) -> Iterator[Clash]:
        if not -100 < self.margin < 100:
            yield clash(
                f"rl.depth_penalty.target.margin={self.margin}: expected percentage points below the reference, 1 for "
                "example",
                "rl.depth_penalty.target.margin",
            )


@dataclass
class DepthPenalty:
    weight: float = setting(0.5, at_least=0, was="rl.lambda_exit")
    """lambda: the reward falls by lambda times what an answer's depth costs. With a target, only its first value."""
    warmup: float = setting(0.0, share=True, was="rl.lambda_warmup")
    """Share of the steps over which lambda rises linearly from 0. Accuracy is compared with the target after them."""
    cost: str = setting("mean", choices=DEPTH_COSTS, was="rl.depth_cost")
    """What an answer's depth costs: mean (of depth/L over its tokens), total (sum, divided by cost_tokens) or max (over
    the tokens that may exit)."""
    cost_tokens: int = setting(32, positive=True, was="rl.cost_length")
    """Tokens that total depth and length_weight count in."""
    length_weight: float = setting(0.0, at_least=0, added_later=True, was="rl.lambda_length")
    """A penalty on length: the reward falls by it for every cost_tokens tokens."""
    penalize: str = setting("all", choices=CHARGES, added_later=True, was="rl.charge")
    """Which answers pay for depth and length: all, or right ones only. Under all, a group without a right answer is
    rewarded for being shallow."""
    credit: str = setting("answer", choices=[name for name, kind in CREDITS.items() if not kind.local], was="rl.credit")
    """What tokens and exits pay for: answer (their answer's depth, as in the paper) or token (their own depth and that
    of later tokens). The longer the answers, the more of either signal is noise; rl.exit_credit has less."""
    target: AccuracyTarget | None = optional(AccuracyTarget)

    def clashes(self) -> Iterator[Clash]:
        if CREDITS[self.credit].to_go and DEPTH_COSTS[self.cost].largest:
            yield clash(
                f"rl.depth_penalty.credit={self.credit} with rl.depth_penalty.cost={self.cost}: the largest depth is "
                "no sum over tokens, so none has a part of it; set rl.depth_penalty.credit=answer, or "
                "rl.exit_credit=true",
                "rl.depth_penalty.credit rl.depth_penalty.cost",
            )
        if self.target and self.weight > LAMBDA_MAX:
            yield clash(
                f"rl.depth_penalty.weight={self.weight}: with rl.depth_penalty.target lambda starts there and stays "
                f"below {LAMBDA_MAX:g}; expected at most that",
                "rl.depth_penalty.weight rl.depth_penalty.target",
            )


@dataclass
class ExitCredit:
    """An exit answers for what it costs itself, against going on at that gate: lambda times its depth, and the weight
    of the KL penalty times kl_weight times the divergence at its token."""

    task_weight: float = setting(0.1, at_least=0, added_later=True, was="rl.exit_task")
    """Weight of the task's advantage on the answer's exits."""
    kl_weight: float = setting(1.0, at_least=0, added_later=True, was="rl.exit_kl")
    """Weight of the divergence at an exit, beside that of the KL penalty."""
    divergence: str = setting("taken", choices=("taken", "all"), added_later=True, was="rl.exit_divergence")
    """Where divergences are known. taken: at the exits that tokens took; for a token that went on, the cost of
    firing is estimated from those that fired with about the same hazard. all: at every exit that a token reached;
    the pool reads the rollouts once more."""


@dataclass
class KLPenalty:
    weight: float = setting(0.05, at_least=0, was="rl.beta")
    """beta: weight of KL(policy || reference)."""
    kind: str = setting("reward", choices=KL_TERMS, was="rl.kl")
    """reward (k1 estimate, subtracted from the reward), loss (k3 estimate, added to the loss) or exact (over the whole
    vocabulary, added to the loss: every token teaches, at the price of another pass of the reference)."""
    sum: bool = setting(False, added_later=True, was="rl.kl_sum")
    """With kind=reward: the estimate is the sum over an answer's tokens, as in E[reward] - beta KL, not their mean. Of
    answers of different length the longer one is then held to the reference at each token as much as the shorter."""

    def clashes(self) -> Iterator[Clash]:
        if self.sum and not KL_TERMS[self.kind].in_reward:
            yield clash(
                f"rl.kl_penalty.sum=true: only the reward holds a sum over an answer; set rl.kl_penalty.kind=reward, "
                f"not {self.kind}",
                "rl.kl_penalty.sum rl.kl_penalty.kind",
            )


@dataclass
class Importance:
    """Positions are weighed by the ratio of the learner's probability to the rollout's."""

    kind: str = setting(
        "truncate", choices=IMPORTANCE, added_later=True, was="rl.importance",
        off="none",
    )  # fmt: skip
    """truncate (the ratio is cut at `high`) or mask (left out outside `low` to `high`)."""
    high: float = setting(2.0, positive=True, was="rl.importance_cap")
    low: float = setting(0.5, at_least=0, added_later=True, was="rl.importance_floor")
    """With kind=mask."""

    def clashes(self) -> Iterator[Clash]:
        if self.kind == "mask" and self.low >= self.high:
            yield clash(
                f"rl.loss.importance.low={self.low}: expected less than rl.loss.importance.high={self.high}",
                "rl.loss.importance.low rl.loss.importance.high",
            )


@dataclass
class Loss:
    advantage: str = setting("rloo", choices=ADVANTAGES, was="rl.advantage")
    """rloo, mean, grpo or none."""
    ratios: str = setting("together", choices=RATIOS, added_later=True, was="rl.ratios")
    """Ratios of token and exit: together (their product weighs and clips both) or apart (each its own)."""
    clip: float = setting(0.2, at_least=0, was="rl.clip")
    """PPO: a position whose ratio to the policy at the start of the step has left 1 +- clip in its advantage's
    direction no longer counts; 0: never. Without effect on the first update of a step."""
    clip_high: float = setting(0.0, at_least=0, added_later=True, was="rl.clip_high")
    """The upper bound apart from the lower one (clip-higher); 0: the same."""
    average: str = setting("answer", choices=AVERAGES, added_later=True, was="rl.loss_average")
    """The loss is a mean over each answer, then over answers (answer), over all tokens (token), or a sum over each
    answer divided by rollout.max_new_tokens (constant). Under answer a token of a long answer counts less."""
    overlong: str = setting("verdict", choices=("verdict", "filter"), added_later=True, was="rl.overlong")
    """Answers cut at rollout.max_new_tokens: as the verifier finds them (verdict) or left out (filter)."""
    drop_equal_groups: bool = setting(False, was="rl.drop_equal_groups")
    """Leave out prompts whose answers all got the same task reward, unless right ones among them pay for depth."""
    importance: Importance | None = optional(Importance, on=True)

    def clashes(self) -> Iterator[Clash]:
        if self.clip_high and self.clip_high < self.clip:
            yield clash(
                f"rl.loss.clip_high={self.clip_high}: expected at least rl.loss.clip={self.clip}, or 0 for the same "
                "bound on both sides",
                "rl.loss.clip_high rl.loss.clip",
            )


@dataclass
class RLConfig:
    steps: int = setting(12, positive=True)
    prompts_per_step: int = setting(16, positive=True)
    group_size: int = setting(4, positive=True)
    """K rollouts per prompt."""
    temperature: float = setting(1.0, positive=True)
    depth_penalty: DepthPenalty = section(DepthPenalty)
    kl_penalty: KLPenalty = section(KLPenalty)
    exit_credit: ExitCredit | None = optional(ExitCredit)
    loss: Loss = section(Loss)
    fixed_depth: int = setting(0, at_least=0, added_later=True)
    """Every token of an answer leaves at this depth, an exit or L, and no gate learns; 0: gates decide."""
    families: list[str] = setting([], added_later=True)
    """Answer problems of these of the task's families only; empty: all."""
    wide_operands: float = setting(0.0, share=True, added_later=True)
    """As traces.wide_operands, for the problems that are answered: the divergence from the reference teaches on them,
    the reward where an answer is right."""
    skip_scoring: bool = setting(False, added_later=True)
    """Learn from a step's rollouts without scoring them first. Only where the objective asks for nothing that they
    don't bring along: one update a step, loss.importance=null, no staleness, no divergence but an exact one of tokens
    or, with exit_credit.divergence=all, those of exits."""
    epochs: int = setting(1, positive=True)
    """Passes over a step's rollouts."""
    minibatches: int = setting(1, positive=True)
    """Updates per pass."""
    decay: str = setting("constant", choices=DECAYS)
    """Learning rate: constant, linear or cosine, to a tenth at the last update."""
    dump_rollouts: bool = setting(False, execution=True)
    """Keep every step's rollouts in the stage's rollouts/ directory."""
    replay: str = setting("")
    """Train on the rollouts of this directory, as dumped, instead of a pool's."""
    gate_centre: float = setting(0.5)
    gate_sharpness: float = setting(1.0, positive=True)
    """The gates that RL starts from have their logits z replaced by sharpness * (z - logit(centre)): what a threshold
    at `gate_centre` decides is then what sampling mostly does. 0.5 and 1 change nothing."""
    adapter_lr: float = setting(3e-4, at_least=0)
    gate_lr: float = setting(1e-3, at_least=0)
    checkpoint_every: int = setting(1, positive=True, execution=True)
    seed: int = setting(0, at_least=0)

    @property
    def credit(self) -> str:
        """What teaches an exit, of CREDITS: its answer's depth, what is left from it on, or what it costs itself."""
        return "exit" if self.exit_credit else self.depth_penalty.credit

    def clashes(self) -> Iterator[Clash]:
        if not 0 < self.gate_centre < 1:
            yield clash(f"rl.gate_centre={self.gate_centre}: expected a hazard between 0 and 1", "rl.gate_centre")
        if self.minibatches > self.prompts_per_step:
            yield clash(
                f"rl.minibatches={self.minibatches}: a step has rl.prompts_per_step={self.prompts_per_step} groups to "
                "share out; give at most as many minibatches",
                "rl.minibatches rl.prompts_per_step",
            )
        if self.loss.advantage != "none" and self.group_size < 2:
            yield clash(
                f"rl.group_size={self.group_size}: rl.loss.advantage={self.loss.advantage} compares the rollouts of "
                "one prompt; expected at least 2, or rl.loss.advantage=none",
                "rl.group_size rl.loss.advantage",
            )
        if self.fixed_depth and self.exit_credit:
            yield clash(
                f"rl.fixed_depth={self.fixed_depth} with rl.exit_credit: no exit is chosen that could answer for "
                "itself; set rl.exit_credit=null",
                "rl.fixed_depth rl.exit_credit",
            )
        if self.depth_penalty.target and self.replay:
            yield clash(
                "rl.depth_penalty.target: recorded rollouts (rl.replay) don't tell what lambda does; set it to null",
                "rl.depth_penalty.target rl.replay",
            )


@dataclass
class VllmConfig:
    python: str = setting(".venv-vllm/bin/python", kind="path", execution=True, was="rollout.vllm_python")
    """The interpreter of the environment that has vLLM (`make vllm`)."""
    compile: bool = setting(True, execution=True, was="rollout.vllm_compile")
    """Compile the model when an actor starts, on a GPU with CUDA graphs; else it runs eagerly."""
    exits: str = setting("masked", choices=("masked", "compact"), execution=True, was="rollout.vllm_exits")
    """masked (every position runs all layers; one that has left keeps its stream) or compact (it runs keys and values
    alone in deeper layers; needs compile=false)."""

    def clashes(self) -> Iterator[Clash]:
        if self.exits == "compact" and self.compile:
            yield clash(
                "rollout.vllm.exits=compact: how many positions run isn't known ahead, which a compiled model needs, "
                "found rollout.vllm.compile=true; set rollout.vllm.compile=false",
                "rollout.vllm.exits rollout.vllm.compile",
            )


@dataclass
class RolloutConfig:
    backend: str = setting("ray", choices=("ray", "vllm", "local"), execution=True)
    """ray (the embedded engine, actors in their own processes), vllm (the same actors, in each a vLLM with exits) or
    local (the embedded engine in process)."""
    vllm: VllmConfig | None = optional(VllmConfig, bound=False)
    """backend=vllm: how, where that is not by default."""
    tensor: int = setting(1, positive=True, execution=True)
    """backend=vllm: devices of an actor, which tensor parallelism shares the model among."""
    actors: int = setting(1, positive=True, execution=True)
    threads: int = setting(2, positive=True, execution=True)
    """Torch threads per actor on a CPU."""
    max_num_seqs: int = setting(128, positive=True, execution=True, was="rollout.rows")
    """Sequences in flight per actor."""
    cache_gib: float = setting(0.0, at_least=0, execution=True)
    """Most memory of an actor's key-value cache, GiB on each of its devices; rows that don't fit wait. 0: as much as
    the rows take or, with backend=vllm, what is left of nine tenths of a GPU (on a CPU 1 GiB)."""
    device_share: float = setting(1.0, positive=True, execution=True)
    """Share of a GPU (of a core, on a CPU) that Ray reserves for an actor; several actors share a device below 1."""
    max_staleness: int = setting(0, at_least=0, was="freshness.max_staleness")
    """RL: versions of the weights that rollouts may be behind. 0: synchronous; more: they are made while the learner
    trains."""
    sync_dtype: str = setting("float32", choices=("float32", "bfloat16"), was="freshness.sync_dtype")
    """What weights travel to the pool in: float32 or bfloat16 (half the bytes; gates only to a bfloat16 decoder)."""
    check_weights: bool = setting(False, execution=True)
    """Compare every tensor on both sides after every sync."""
    max_new_tokens: int = setting(48, positive=True)
    stop: list[str] = setting(["\n"], kind="text")
    prompt_template: str = setting("plain", choices=("plain", "chat"))
    """plain (Question: ... Answer:) or chat (the tokenizer's chat template)."""
    timeout_s: float = setting(0.0, at_least=0, execution=True)
    """Deadline of a call on an actor (a chunk of answers or traces, a new version of the weights), seconds; 0: ten
    minutes and a quarter of a second per token of max_new_tokens. An actor may take as long to start, and at least
    three minutes, three more where vLLM compiles, and one second per 100 MB of weights to read."""
    failure_budget: int = setting(3, at_least=0, execution=True)
    """Actor deaths after which a run stops."""

    def clashes(self) -> Iterator[Clash]:
        share, vllm = self.device_share, self.backend == "vllm"
        if "" in self.stop:
            yield clash(
                f"rollout.stop={list(self.stop)}: holds an empty text, which every answer contains; expected texts "
                "that end an answer, or none (rollout.stop=[])",
                "rollout.stop",
            )
        if share > 1 and share != int(share):
            yield clash(
                f"rollout.device_share={share}: expected a fraction up to 1, or whole devices", "rollout.device_share"
            )
        if self.tensor > 1 and not vllm:
            yield clash(
                f"rollout.tensor={self.tensor}: rollout.backend={self.backend} has the whole model on one device; set "
                "rollout.tensor=1, or rollout.backend=vllm",
                "rollout.tensor rollout.backend",
            )
        if self.vllm and not vllm:
            yield clash(
                f"rollout.vllm: is for rollout.backend=vllm, found {self.backend}; set rollout.vllm=null",
                "rollout.vllm rollout.backend",
            )


@dataclass
class Controls:
    """Compare the last model with exit rules that know less, at its mean depth and at its accuracy; up to 28 readings
    of the validation split and 2 of the test split per rule (docs/evaluation.md)."""

    policy: str = setting("", kind="path", was="evaluate.control_policy")
    """One more of them: the gates of another run, by its policy checkpoint or rl stage directory, as of one without a
    depth penalty or at full depth (rl.fixed_depth)."""


@dataclass
class Externalisation:
    """Measure how much of its reasoning each model writes down; about as much as 12 evaluations of `prompts` problems
    per model (docs/evaluation.md)."""

    prompts: int = setting(100, at_least=0, was="evaluate.externalisation_prompts")
    """Test problems for that; 0: all."""


@dataclass
class StyleChoice:
    """Tasks with styles: which one a model answers in, and what each costs it, sampled as RL samples."""

    models: str = setting(choices=("reinforced", "all"), added_later=True, was="evaluate.choice", off="")
    """Of the last model (reinforced), or also of the teacher and of the policy that RL starts from (all)."""
    answers: int = setting(300, positive=True, added_later=True, was="evaluate.choice_answers")
    """Sampled answers for that, per family and condition."""


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
    controls: Controls | None = optional(Controls, was="evaluate.controls", bound=False)
    externalisation: Externalisation | None = optional(Externalisation, was="evaluate.externalisation")
    style_choice: StyleChoice | None = optional(StyleChoice)

    def clashes(self) -> Iterator[Clash]:
        outside = [threshold for threshold in self.thresholds if not 0 <= threshold <= 1]
        if not self.thresholds or outside:
            yield clash(
                f"evaluate.thresholds={outside}: one of them is chosen; expected at least one value, from 0 to 1",
                "evaluate.thresholds",
            )


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

    def clashes(self) -> Iterator[Clash]:
        if self.zero_stage not in (0, 1, 2, 3):
            yield clash(f"deepspeed.zero_stage={self.zero_stage}: expected 0, 1, 2 or 3", "deepspeed.zero_stage")


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
    name: str = setting(kind="name")
    """Results go to <runs>/<name>/<stage>-<hash of what the stage depends on>."""
    runs: str = "runs"
    device: str = setting("auto", choices=("auto", "cpu", "cuda"))
    """cpu; cuda, refused where there is none; or auto: cuda where there is one, and refused like it in a cluster whose
    nodes have GPUs (cluster.gpus_per_node)."""
    deterministic: bool = False
    """Only deterministic kernels, where a GPU has a choice (slower). On a CPU a seed always gives the same metrics."""
    init_policy: str = setting("", was="start.start")
    """rl, evaluate: a policy checkpoint to use instead of this configuration's own calibration."""
    model: ModelConfig = section(ModelConfig)
    parallel: ParallelConfig = section(ParallelConfig)
    exits: ExitsConfig = section(ExitsConfig)
    adapter: AdapterConfig = section(AdapterConfig)
    task: TaskConfig = section(TaskConfig)
    pretrain: PretrainConfig | None = optional(PretrainConfig, was="pretrain.enabled")
    teacher: TeacherConfig | None = optional(TeacherConfig, was="teacher.enabled", on=True)
    traces: TracesConfig = section(TracesConfig)
    calibrate: CalibrateConfig = section(CalibrateConfig)
    rl: RLConfig = section(RLConfig)
    rollout: RolloutConfig = section(RolloutConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)
    deepspeed: DeepspeedConfig = section(DeepspeedConfig)
    tracker: TrackerConfig = section(TrackerConfig)
    cluster: ClusterConfig = section(ClusterConfig)


KEYS = tuple(known(RunConfig))
"""Every key there is."""
