"""Every setting of every run. One dataclass per section; the doc of a field stands under it, its `Rules` beside it.

Rules across fields are in validate.py.
Sections that change results are part of a stage's identity (identity.py); `parallel`, `tracker`, `cluster` and fields
with `execution=True` are not: they change how a result is computed, not what it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..objectives.advantages import ADVANTAGES, CHARGES
from ..objectives.depth import CREDITS, DEPTH_COSTS
from ..objectives.distillation import GATE_TARGETS
from ..objectives.divergences import KL_DIRECTIONS, TEACHERS
from ..objectives.policy_gradient import IMPORTANCE, KL_TERMS, RATIOS
from ..objectives.schedules import DECAYS
from ..objectives.weights import AVERAGES
from .fields import all_settings, optional, section, setting

SEQUENCE_MULTIPLE = 8
"""A micro-batch's positions are padded to a multiple of this, which parallel.sequence_parallel shares out."""


@dataclass
class ModelConfig:
    path: str = setting(kind="path")
    """Hugging Face directory or hub id (OWNER/NAME[@REVISION]); without weights for pretrain or model.checkpoint."""
    checkpoint: str = setting("", kind="path", added_later=True)
    """Megatron checkpoint (Megatron-LM, Megatron-Bridge, `convert import`) whose weights are taken."""
    dtype: str = setting("auto", choices=("auto", "float32", "bfloat16"))
    """auto: bfloat16 on a GPU and on a CPU that multiplies it (AMX, AVX512-BF16), else float32."""


@dataclass
class ParallelConfig:
    tensor: int = setting(1, above=0)
    pipeline: int = setting(1, above=0)
    data: int = setting(1, above=0)
    """Ranks = tensor * pipeline * data. Pipeline stages meet at the exits nearest to an even split."""
    sequence_parallel: bool = False
    tokens_per_micro_batch: int = setting(2048, above=0)
    """Positions of a micro-batch, shared prompts counted once; a longer sequence gets a micro-batch of its own."""
    recompute: bool = False
    """Recompute every layer in the backward pass instead of storing its activations."""
    timeout_s: int = setting(1800, above=0)
    """Seconds for every collective, and between signs of life of rank 0 while the others wait for it."""


@dataclass
class ExitsConfig:
    depths: list[int] = setting([])
    """Exit depths (layers run); empty: every fifth layer and the stage boundaries."""
    gate_width: int | float = setting(2, above=0)
    """Hidden width of a gate in units of the model's hidden size."""
    gate_input: str = setting("normalised", choices=("normalised", "raw"))
    """normalised (residual stream over its root mean square) or raw (the paper's)."""
    first_token: bool = setting(False, added_later=True)
    """The prompt's last position, which predicts the first generated token, may exit, too."""

    def __post_init__(self) -> None:
        # 2.0 is the same setting as 2, and has the same name for its results.
        if isinstance(self.gate_width, float) and self.gate_width.is_integer():
            self.gate_width = int(self.gate_width)


@dataclass
class AdapterConfig:
    full: bool = False
    """Full fine-tuning: every weight of the model is trained; the other fields are not used."""
    rank: int = setting(32, at_least=0)
    alpha: float = setting(32.0, above=0)
    dropout: float = setting(0.0, at_least=0, below=1)
    """Only in calibration and teacher training; 0 keeps learner and rollouts exactly alike."""
    targets: str = setting("all", choices=("attention", "all"))
    """attention (q, k, v, o, the paper's) or all (MLP too)."""


@dataclass
class DatasetNames:
    """Names of a data set's columns and splits. Dots lead into nested columns: extra.question."""

    question_column: str = setting("question", was="task.question_column")
    answer_column: str = setting("answer", was="task.answer_column")
    """The reference, or steps that end in "#### reference" or \\boxed{reference}."""
    choices_column: str = setting("", was="task.choices_column")
    """A list of options, shown with letters; the answer is a letter, an option's text or its number. Empty: none."""
    train_split: str = setting("train", was="task.train_split")
    evaluation_split: str = setting("test", was="task.evaluation_split")
    """Empty: evaluation problems are taken from the train split too."""


HOPS = ("hops", "hops_start_first", "hops_bare", "hops_merged", "hops_parallel", "hops_secret", "hops_cheap_secret")
"""Chains of permutations and their variants (tasks/chains.py)."""
WORDED = ("sums", "shuffles", "pointers", "pointers_short", "cups")
"""Chains in words, for pretrained models."""


@dataclass
class TaskConfig:
    name: str = setting(
        "arithmetic", kind="code",
        choices=("arithmetic", "gsm8k", "tom", *HOPS, *WORDED, "reasoning_gym", "verifiers", "dataset", "jsonl"),
    )  # fmt: skip
    """Built in: arithmetic, tom, hops and its variants, sums; others read files or a package. FILE.py:CLASS: a task of
    yours (docs/tasks.md)."""
    families: list[str] = setting(["product", "sum", "word"])
    """Kinds of problems, by task (docs/tasks.md)."""
    operands: str = setting("small", choices=("small", "wide"), added_later=True)
    """arithmetic: few pairs of small numbers (66 products), or wide ones, harder and mostly met once."""
    tokens_per_step: int = setting(1, above=0, added_later=True)
    """hops: tokens of a written step."""
    slots: int = setting(4, above=0, added_later=True)
    """hops and sums: most hops of a problem; of hops, operations that a prompt has room for."""
    path: str = ""
    """gsm8k and dataset: a .jsonl or .parquet file, a directory of them, a saved `datasets` data set, or a hub id.
    verifiers: an installed environment's id."""
    arguments: dict[str, Any] = setting({}, added_later=True)
    """verifiers: what the environment takes, as {split: train}."""
    dataset: DatasetNames | None = optional(DatasetNames, bound=False)
    """gsm8k and dataset: names of columns and splits that differ from the defaults."""
    reward: str = setting("", kind="code", added_later=True)
    """FILE.py:NAME, a function that scores answers instead of the task's own verdict (docs/tasks.md)."""
    seed: int = setting(0, at_least=0)
    """Which problems, of those a task can make or read, belong to which split; of hops, the permutations, too."""
    train: int = setting(0, at_least=0)
    """Training problems; 0: all there are."""
    validation: int = setting(200, above=0)
    evaluation: int = setting(400, above=0)

    def __post_init__(self) -> None:
        # A section with only default values is the same as none: older runs name all fields.
        if self.dataset == DatasetNames():
            self.dataset = None


@dataclass
class PretrainConfig:
    """Train all weights on the task's worked problems, question and answer, before any other stage."""

    init: str = setting("random", choices=("random", "model"), added_later=True)
    """random (the shape in model.path's config.json) or model (the weights at model.path)."""
    layers: int = setting(0, at_least=0, added_later=True)
    """Layers of a random model; 0: config.json's."""
    width: int = setting(0, at_least=0, added_later=True)
    """Hidden size of a random model; MLP and number of heads in proportion. 0: config.json's."""
    steps: int = setting(1000, above=0)
    batch_size: int = setting(64, above=0)
    """Sequences per update."""
    learning_rate: float = setting(3e-3, above=0)
    checkpoint_every: int = setting(200, above=0, execution=True)
    seed: int = setting(0, at_least=0)
    """Decides random weights and the order of the problems."""


@dataclass
class TeacherConfig:
    """Train the teacher. null: the model at model.path, or the pretrained one, is the teacher, unchanged."""

    shots: int = setting(4, at_least=0)
    problems: int = setting(330, above=0)
    samples: int = setting(4, above=0)
    epochs: int = setting(4, above=0)
    batch_size: int = setting(16, above=0)
    learning_rate: float = setting(5e-4, above=0)


@dataclass
class TracesConfig:
    problems: int = setting(1150, above=0)
    temperature: float = setting(0.7, above=0)
    wide_operands: float = setting(0.0, at_least=0, at_most=1, added_later=True)
    """arithmetic on small operands: share of the problems whose operands are wide."""


@dataclass
class CalibrateConfig:
    epochs: float = setting(2.0, above=0)
    exit_samples: int = setting(4, above=0, was="calibrate.patterns")
    """S: exit patterns drawn per sequence and epoch."""
    batch_size: int = setting(32, above=0)
    """Sequences (traces x exit_samples) per update."""
    kl_factor: float = setting(1.0, above=0)
    """c in s* = 2(1 - sigmoid(c d))."""
    kl_direction: str = setting("student_teacher", choices=KL_DIRECTIONS)
    """student_teacher, teacher_student or jensen_shannon."""
    teacher: str = setting("topk", choices=TEACHERS)
    """Compared with: topk (most probable tokens and one lumped tail) or full (one more forward pass)."""
    gate_targets: str = setting("sampled", choices=GATE_TARGETS)
    """sampled (the drawn exit), soft (hazards of the traces) or current (the student's own divergence)."""
    student_patterns: float = setting(0.0, at_least=0, at_most=1)
    """Share of the updates, at the end, whose exit patterns come from the student's own gates."""
    uniform_patterns: float = setting(0.0, at_least=0, at_most=1)
    """Share of patterns drawn uniformly over the exits: trains shallow unembeddings, too."""
    full_patterns: float = setting(0.0, at_least=0, at_most=1, added_later=True)
    """Share of patterns without any exit: preserves the answers at full depth."""
    depth_power: float = setting(0.0, at_least=0)
    """A position's KL is weighted by (exit depth / L) to this power: hopeless shallow exits affect adapters less."""
    kl_scale: float = setting(0.0, at_least=0, added_later=True, was="calibrate.reach")
    """Nats: the share exp(-KL / kl_scale) of a shallow KL has the weight of full depth; 0: none of it."""
    wise_ft_alpha: float = setting(1.0, at_least=0, at_most=1, was="calibrate.keep")
    """Share of the weights' change that remains when the adapters' training ends (WiSE-FT)."""
    gate_only_fraction: float = setting(0.0, at_least=0, at_most=1, was="calibrate.settle")
    """Share of the updates, at the end, after `wise_ft_alpha`, that train the gates alone."""
    adapter_lr: float = setting(1e-3, at_least=0)
    gate_lr: float = setting(1e-3, at_least=0)
    gate_weight: float = setting(1.0, at_least=0)
    checkpoint_every: int = setting(20, above=0, execution=True)
    seed: int = setting(0, at_least=0)


@dataclass
class AccuracyTarget:
    """lambda follows the accuracy: lambda rises while accuracy is above the target and falls while it is below."""

    margin: float = setting(above=-100, below=100, was="rl.accuracy_floor", off=None, added_later=True)
    """The target: percentage points below the reference's accuracy on the same prompts."""
    window: int = setting(8, above=0, added_later=True, was="rl.accuracy_window")
    """Steps in the running means of the policy's and the reference's accuracy. Until that many have been compared,
    lambda's update is scaled by steps compared / window."""
    samples: int = setting(4, at_least=0, added_later=True, was="rl.accuracy_samples")
    """Answers that the reference gives to each prompt, before the first step. 0: group_size answers, only to prompts of
    the first `window` steps, whose mean stands for the others."""
    rate: float = setting(0.5, at_least=0, added_later=True, was="rl.lambda_rate")
    """Lasting change of lambda in a step, per unit of accuracy (1 = 100 points)."""


@dataclass
class DepthPenalty:
    weight: float = setting(0.5, at_least=0, was="rl.lambda_exit")
    """lambda: the reward falls by lambda times an answer's depth cost. With a target, only the initial value."""
    warmup: float = setting(0.0, at_least=0, at_most=1, was="rl.lambda_warmup")
    """Share of the steps over which lambda rises linearly from 0. Accuracy is compared with the target after them."""
    cost: str = setting("mean", choices=DEPTH_COSTS, was="rl.depth_cost")
    """mean (of depth/L over tokens), total (sum / cost_tokens) or max (over tokens that may exit)."""
    cost_tokens: int = setting(32, above=0, was="rl.cost_length")
    """Tokens that total depth and length_weight count in."""
    length_weight: float = setting(0.0, at_least=0, added_later=True, was="rl.lambda_length")
    """Penalty on length: the reward falls by this for every cost_tokens tokens."""
    penalize: str = setting("all", choices=CHARGES, added_later=True, was="rl.charge")
    """Which answers pay for depth and length: all, or right ones only."""
    credit: str = setting("answer", choices=[name for name, kind in CREDITS.items() if not kind.local], was="rl.credit")
    """What a token pays for: answer (its answer's depth) or token (its own depth and that of later tokens)."""
    target: AccuracyTarget | None = optional(AccuracyTarget)


@dataclass
class ExitCredit:
    """Each exit is credited with its own cost, against continuing at that gate: lambda times its depth, plus the weight
    of the KL penalty times kl_weight times the divergence at its token."""

    task_weight: float = setting(0.1, at_least=0, added_later=True, was="rl.exit_task")
    """Weight of the task's advantage on the answer's exits."""
    kl_weight: float = setting(1.0, at_least=0, added_later=True, was="rl.exit_kl")
    """Weight of the divergence at an exit, beside that of the KL penalty."""
    divergence: str = setting("taken", choices=("taken", "all"), added_later=True, was="rl.exit_divergence")
    """Computed at the exits that tokens took (taken), or at all that they reached (another pass of the pool)."""


@dataclass
class KLPenalty:
    weight: float = setting(0.05, at_least=0, was="rl.beta")
    """beta: weight of KL(policy || reference)."""
    kind: str = setting("reward", choices=KL_TERMS, was="rl.kl")
    """reward (k1, its mean over an answer's tokens subtracted), reward_sum (its sum, as in E[reward] - beta KL), loss
    (k3, added) or exact (whole vocabulary; another reference pass)."""


@dataclass
class Importance:
    """Weight positions by the ratio of the learner's probability to the rollout's."""

    kind: str = setting(
        "truncate", choices=IMPORTANCE, added_later=True, was="rl.importance",
        off="none",
    )  # fmt: skip
    """truncate (ratios are capped at `high`) or mask (positions outside `low` to `high` are left out)."""
    high: float = setting(2.0, above=0, was="rl.importance_cap")
    low: float = setting(0.5, at_least=0, added_later=True, was="rl.importance_floor")
    """With kind=mask."""


@dataclass
class Loss:
    advantage: str = setting("rloo", choices=ADVANTAGES, was="rl.advantage")
    """rloo, mean, grpo or none."""
    ratios: str = setting("together", choices=RATIOS, added_later=True, was="rl.ratios")
    """Ratios of token and exit: together (their product weighs and clips both) or apart (each its own)."""
    clip: float = setting(0.2, at_least=0, was="rl.clip")
    """PPO's clip range, 1 +- clip, around the policy at the start of the step; 0: never."""
    clip_high: float = setting(0.0, at_least=0, added_later=True, was="rl.clip_high")
    """An upper bound other than the lower one (clip-higher); 0: the same."""
    average: str = setting("answer", choices=AVERAGES, added_later=True, was="rl.loss_average")
    """Mean over each answer, then answers (answer); over all tokens (token); sum / max_new_tokens (constant)."""
    overlong: str = setting("verdict", choices=("verdict", "filter"), added_later=True, was="rl.overlong")
    """Answers cut at rollout.max_new_tokens: rewarded by the verifier (verdict) or left out (filter)."""
    drop_equal_groups: bool = setting(False, was="rl.drop_equal_groups")
    """Leave out prompts whose answers all got the same task reward, unless right ones among them pay for depth."""
    importance: Importance | None = optional(Importance, on=True)


@dataclass
class RLConfig:
    steps: int = setting(12, at_least=0)
    """0: calibration only."""
    prompts_per_step: int = setting(16, above=0)
    group_size: int = setting(4, above=0)
    """K rollouts per prompt."""
    temperature: float = setting(1.0, above=0)
    depth_penalty: DepthPenalty = section(DepthPenalty)
    kl_penalty: KLPenalty = section(KLPenalty)
    exit_credit: ExitCredit | None = optional(ExitCredit)
    loss: Loss = section(Loss)
    fixed_depth: int = setting(0, at_least=0, added_later=True)
    """Every token of an answer exits at this depth, an exit or L, and no gate is trained; 0: gates decide."""
    families: list[str] = setting([], added_later=True)
    """Only problems of these families of the task; empty: all."""
    wide_operands: float = setting(0.0, at_least=0, at_most=1, added_later=True)
    """As traces.wide_operands, for the problems that are answered."""
    skip_scoring: bool = setting(False, added_later=True)
    """Update on rollouts without scoring them first, if the objective needs no other scores."""
    minibatches: int = setting(1, above=0)
    """Updates per step, each on a share of its rollouts."""
    decay: str = setting("constant", choices=DECAYS)
    """Learning rate: constant, linear or cosine, to a tenth at the last update."""
    dump_rollouts: bool = setting(False, execution=True)
    """Write every step's rollouts to the stage's rollouts/ directory."""
    gate_centre: float = setting(0.5, above=0, below=1)
    gate_sharpness: float = setting(1.0, above=0)
    """The gates start with logits sharpness * (z - logit(centre)) in place of z; .5 and 1: unchanged."""
    adapter_lr: float = setting(3e-4, at_least=0)
    gate_lr: float = setting(1e-3, at_least=0)
    checkpoint_every: int = setting(1, above=0, execution=True)
    seed: int = setting(0, at_least=0)

    @property
    def credit(self) -> str:
        """Credit of an exit, of CREDITS: its answer's depth, its own depth and later tokens', or its own cost."""
        return "exit" if self.exit_credit else self.depth_penalty.credit


@dataclass
class VllmConfig:
    python: str = setting(".venv-vllm/bin/python", kind="path", execution=True, was="rollout.vllm_python")
    """The interpreter of the environment that has vLLM (`make vllm`)."""
    compile: bool = setting(True, execution=True, was="rollout.vllm_compile")
    """Compile the model when an actor starts, on a GPU with CUDA graphs; else it runs eagerly."""
    tensor: int = setting(1, above=0, execution=True, was="rollout.tensor")
    """Devices of an actor, which tensor parallelism shares the model among."""


@dataclass
class RolloutConfig:
    backend: str = setting("ray", choices=("ray", "vllm", "local"), execution=True)
    """ray (the embedded engine, in actors), vllm (a vLLM with exits in each) or local (in process)."""
    vllm: VllmConfig | None = optional(VllmConfig, bound=False)
    """backend=vllm: settings that differ from the defaults."""
    actors: int = setting(1, above=0, execution=True)
    threads: int = setting(2, above=0, execution=True)
    """Torch threads per actor on a CPU."""
    max_num_seqs: int = setting(128, above=0, execution=True, was="rollout.rows")
    """Sequences in flight per actor."""
    cache_gib: float = setting(0.0, at_least=0, execution=True)
    """GiB of an actor's key-value cache per device; 0: as much as its rows need, with vLLM nine tenths of a GPU."""
    device_share: float = setting(1.0, above=0, execution=True)
    """Share of a GPU (of a core, on a CPU) that Ray reserves for an actor; several actors share a device below 1."""
    max_staleness: int = setting(0, at_least=0, was="freshness.max_staleness")
    """RL: versions that rollouts may be behind. 0: synchronous; more: made while the learner trains."""
    sync_dtype: str = setting("float32", choices=("float32", "bfloat16"), was="freshness.sync_dtype")
    """Dtype of the weights on their way to the pool; bfloat16 halves the bytes."""
    max_new_tokens: int = setting(48, above=0)
    stop: list[str] = setting(["\n"], kind="text")
    prompt_template: str = setting("plain", choices=("plain", "chat"))
    """plain (Question: ... Answer:) or chat (the tokenizer's chat template)."""
    chat_template_kwargs: dict[str, Any] = setting({}, added_later=True)
    """Variables of the chat template, as {enable_thinking: false} of Qwen3's."""
    timeout_s: float = setting(0.0, at_least=0, execution=True)
    """Deadline of a call on an actor, seconds; 0: by length of answers and size of weights (docs/cluster.md)."""
    failure_budget: int = setting(3, at_least=0, execution=True)
    """Actor deaths after which a run stops."""

    def __post_init__(self) -> None:
        if self.vllm == VllmConfig():
            self.vllm = None

    @property
    def tensor(self) -> int:
        """Devices of an actor; those of the embedded engine have one."""
        return self.vllm.tensor if self.vllm else 1


@dataclass
class Controls:
    """Compare the last model with less informed exit rules, at its mean depth and at its accuracy; up to 28 passes over
    the validation split and 2 over the test split per rule (docs/evaluation.md)."""

    policy: str = setting("", kind="path", was="evaluate.control_policy")
    """The gates of another run, too: its policy checkpoint or rl stage directory."""


@dataclass
class Externalisation:
    """Measure how much of its reasoning each model writes down; about as much as 12 evaluations of `prompts` problems
    per model (docs/evaluation.md)."""

    prompts: int = setting(100, at_least=0, was="evaluate.externalisation_prompts")
    """Test problems for that; 0: all."""


@dataclass
class StyleChoice:
    """Tasks with styles: measure which style a model chooses and what each costs it, sampled as in RL."""

    models: str = setting(choices=("reinforced", "all"), added_later=True, was="evaluate.choice", off="")
    """Of the last model (reinforced), or also of the teacher and of the policy that RL starts from (all)."""
    answers: int = setting(300, above=0, added_later=True, was="evaluate.choice_answers")
    """Sampled answers for that, per family and condition."""


@dataclass
class EvaluateConfig:
    thresholds: list[float] = setting([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], at_least=0, at_most=1)
    """Hazard thresholds tried on the validation split."""
    tolerance: float = setting(0.02, at_least=0)
    """Chosen is the shallowest threshold whose validation accuracy is within this of the best."""
    wide_problems: int = setting(0, at_least=0, added_later=True)
    """arithmetic, small: number of validation problems on wide operands that also choose the threshold."""
    wide_test: int = setting(0, at_least=0, added_later=True)
    """arithmetic, small: number of test problems on wide operands that every model is measured on."""
    answers: int = setting(12, at_least=0)
    """Answers stored token by token for the report."""
    controls: Controls | None = optional(Controls, was="evaluate.controls", bound=False)
    externalisation: Externalisation | None = optional(Externalisation, was="evaluate.externalisation")
    style_choice: StyleChoice | None = optional(StyleChoice)


@dataclass
class DeepspeedConfig:
    zero_stage: int = setting(1, choices=(0, 1, 2, 3), execution=True)
    """Data-parallel ranks share out: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too."""
    gradient_clipping: float = setting(1.0, at_least=0)
    """Largest gradient norm; 0: not clipped."""
    eps: float = setting(1e-8, above=0)


@dataclass
class TrackerConfig:
    kind: str = setting("wandb", choices=("wandb", "trackio", "mlflow"))
    """What receives the metrics beside metrics.jsonl; trackio and mlflow have to be installed."""
    wandb: str = setting("auto", choices=("auto", "online", "offline", "disabled"))
    """auto (by WANDB_MODE, else online with a key, else offline), online, offline or disabled."""


@dataclass
class ClusterConfig:
    nodes: int = setting(1, above=0)
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
    """auto: cuda if there is one, else cpu; an error without one in a cluster with GPUs."""
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
    cluster: ClusterConfig | None = optional(ClusterConfig)
    """Nodes of a Slurm job; null: one machine."""

    def __post_init__(self) -> None:
        if self.cluster == ClusterConfig():
            self.cluster = None

    @property
    def job(self) -> ClusterConfig:
        """Resources of a job; without `cluster` one node without GPUs."""
        return self.cluster or ClusterConfig()


KEYS = tuple(all_settings(RunConfig))
"""Every key there is."""
