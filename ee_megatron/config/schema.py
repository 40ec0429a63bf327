"""Every setting of every run. One dataclass per group; the doc of a field stands under it.

Sections that change results are part of a stage's identity (config/identity.py); `parallel`, `tracker`, `cluster` and
the execution fields of `rollout` are not: they change how a result is computed, not what it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ModelConfig:
    path: str = "???"
    """Hugging Face model directory: config.json, safetensors, tokenizer; with pretrain.enabled, config.json only."""
    dtype: str = "auto"
    """float32, bfloat16 or auto: bfloat16 on a GPU and on a CPU with AMX, float32 on other CPUs."""


@dataclass
class ParallelConfig:
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    """Ranks = tensor * pipeline * data."""
    virtual: int = 1
    """Stages per pipeline rank; more than 1: interleaved schedule, fewer idle ranks at the start and end of a step."""
    stage_layers: list[int] = field(default_factory=list)
    """Layers per stage (pipeline * virtual of them); empty: boundaries at the exits nearest to an even split."""
    sequence_parallel: bool = False
    micro_batch_size: int = 8
    """Sequences per micro-batch."""
    recompute: bool = False
    """Recompute every layer in the backward pass instead of storing its activations."""
    timeout_s: int = 1800
    """Deadline of every collective, seconds."""


@dataclass
class ExitsConfig:
    depths: list[int] = field(default_factory=list)
    """Exit depths (layers run); empty: every fifth layer and the stage boundaries."""
    gate_width: int = 2
    """Hidden width of a gate in units of the model's hidden size."""
    gate_input: str = "normalised"
    """normalised (residual stream over its root mean square) or raw (the paper's)."""


@dataclass
class AdapterConfig:
    full: bool = False
    """Full fine-tuning: every weight of the model is trained, there are no adapters, the other fields are not used."""
    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    """Only in calibration and teacher training; 0 keeps learner and rollouts exactly alike."""
    targets: str = "all"
    """attention (q, k, v, o, the paper's) or all (MLP too)."""


@dataclass
class TaskConfig:
    name: str = "arithmetic"
    """arithmetic and tom (built in), reasoning_gym, gsm8k or dataset (also: jsonl); docs/tasks.md describes them."""
    families: list[str] = field(default_factory=lambda: ["product", "sum", "word"])
    """arithmetic: product, sum, word, chain; tom: first_order, second_order, true_belief, reality, memory;
    reasoning_gym: names of its families, chain_sum for one."""
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
    train: int = 0
    """Training problems; 0: all there are."""
    validation: int = 200
    evaluation: int = 400
    seed: int = 0
    """Decides which problems belong to which split."""
    verifier_workers: int = 1
    verifier_deadline_s: float = 5.0
    verifier_memory_mb: int = 4096
    """Memory of one verifier process, MiB; 0: no limit."""


@dataclass
class PretrainConfig:
    enabled: bool = False
    """true: model.path holds no weights but a shape (config.json); weights are drawn at random and trained on the
    task's worked problems, question and answer."""
    steps: int = 1000
    batch_size: int = 64
    """Sequences per update."""
    learning_rate: float = 3e-3
    warmup: float = 0.05
    """Share of the updates with a rising learning rate; then it falls linearly to a tenth."""
    checkpoint_every: int = 200
    seed: int = 0
    """Decides the first weights and the order of the problems."""


@dataclass
class TeacherConfig:
    enabled: bool = True
    """false: the model at model.path, or the one that is pretrained, is the teacher as it is."""
    shots: int = 4
    problems: int = 330
    samples: int = 4
    temperature: float = 0.7
    epochs: int = 4
    batch_size: int = 16
    learning_rate: float = 5e-4
    seed: int = 0


@dataclass
class TracesConfig:
    problems: int = 1150
    samples: int = 1
    temperature: float = 0.7
    top_k: int = 16
    """Kept teacher log-probabilities per position; the rest is one lumped tail."""
    only_correct: bool = False
    seed: int = 0


@dataclass
class CalibrateConfig:
    epochs: float = 2.0
    patterns: int = 4
    """S: exit patterns drawn per sequence and epoch."""
    batch_size: int = 32
    """Sequences (traces x patterns) per update."""
    kl_factor: float = 1.0
    """c in s* = 2(1 - sigmoid(c d))."""
    kl_direction: str = "student_teacher"
    """student_teacher, teacher_student or jensen_shannon."""
    teacher: str = "topk"
    """What the student is compared with: topk (the traces' most probable tokens and one lumped tail) or full (the whole
    distribution, recomputed by the learner, which costs a forward pass)."""
    gate_targets: str = "sampled"
    """sampled (negative log-likelihood of the drawn exit), soft (cross-entropy to the target hazards of the traces) or
    current (cross-entropy, for the exit taken, to the target of the student's own divergence there and now)."""
    student_patterns: float = 0.0
    """Share of the updates, at the end, whose patterns come from the student's own gates instead of the traces' target
    hazards, under a threshold drawn for each sequence from [0.5, 1): so it learns to read what it has left early as
    context. Costs a scoring pass."""
    uniform_patterns: float = 0.0
    """Share of patterns drawn uniformly over the exits instead: trains shallow readouts too."""
    depth_power: float = 0.0
    """The KL of a position counts (exit depth / L) to this power: hopeless shallow exits pull less at the adapters."""
    keep: float = 1.0
    """Share of the change of the weights that is kept when the adapters' training ends (WiSE-FT): less of it, less is
    forgotten of what the traces don't hold."""
    keep_upper: float = 1.0
    """Share of that kept in the upper half of the layers, where a change serves few exits and disturbs full depth.
    Better answers after calibration, a worse start for RL (docs/results.md)."""
    settle: float = 0.0
    """Share of the updates, at the end, after `keep` and `keep_upper` have been applied, that train the gates alone."""
    adapter_lr: float = 1e-3
    gate_lr: float = 1e-3
    warmup: float = 0.05
    """Share of the updates with a rising learning rate; then it falls linearly to a tenth."""
    gate_weight: float = 1.0
    checkpoint_every: int = 20
    seed: int = 0


@dataclass
class RLConfig:
    steps: int = 12
    prompts_per_step: int = 16
    group_size: int = 4
    """K rollouts per prompt."""
    temperature: float = 1.0
    lambda_exit: float = 0.5
    """Price of depth: reward falls by lambda times the mean depth as a fraction of the layers."""
    lambda_warmup: float = 0.0
    """Share of the steps over which the price rises linearly from 0."""
    depth_cost: str = "mean"
    """mean (of depth/L over the answer's tokens) or total (sum, divided by cost_length)."""
    cost_length: int = 32
    depth_credit: str = "sequence"
    """sequence (the cost is part of the answer's reward) or token (a token answers for the depth from it on only)."""
    beta: float = 0.05
    """Weight of KL(policy || reference)."""
    kl: str = "reward"
    """reward (k1 estimate, subtracted from the reward), loss (k3 estimate, added to the loss) or exact (over the whole
    vocabulary, added to the loss: every token teaches, at the price of another pass of the reference)."""
    advantage: str = "rloo"
    """rloo, mean, grpo or none."""
    surrogate: str = "ppo"
    """What the loss does with the ratio to the policy at the start of the step: ppo (a clipped ratio per position,
    token and exit together) or gspo (one per answer, the geometric mean over its positions; `clip` is then far smaller,
    3e-4 in its paper)."""
    importance_cap: float = 2.0
    """Truncation of the importance ratio learner/rollout (token and exit together)."""
    epochs: int = 1
    """Passes over a step's rollouts."""
    minibatches: int = 1
    """Updates per pass."""
    clip: float = 0.2
    """PPO: a position whose ratio to the policy at the start of the step has left 1 +- clip in its advantage's
    direction no longer counts; 0: never. Without effect on the first update of a step."""
    entropy_bonus: float = 0.0
    """Weight of the gates' entropy (nats per position) as a bonus."""
    drop_equal_groups: bool = False
    """Leave out prompts whose answers all got the same task reward."""
    warmup: int = 0
    """Updates with a linearly rising learning rate."""
    decay: str = "constant"
    """Learning rate after warm-up: constant, linear or cosine, to a tenth at the last update."""
    dump_rollouts: bool = False
    """Keep every step's rollouts in the stage's rollouts/ directory."""
    replay: str = ""
    """Train on the rollouts of this directory, as dumped, instead of a pool's."""
    gate_centre: float = 0.5
    gate_sharpness: float = 1.0
    """The gates that RL starts from have their logits z replaced by sharpness * (z - logit(centre)): what a threshold
    at `gate_centre` decides is then what sampling mostly does. 0.5 and 1 change nothing."""
    adapter_lr: float = 3e-4
    gate_lr: float = 1e-3
    checkpoint_every: int = 1
    seed: int = 0


@dataclass
class RolloutConfig:
    backend: str = "ray"
    """ray (actors in their own processes) or local (in process)."""
    actors: int = 1
    threads: int = 2
    """Torch threads per actor on a CPU."""
    rows: int = 128
    """Sequences in flight per actor."""
    device_share: float = 1.0
    """Share of a GPU (of a core, on a CPU) that Ray reserves for an actor; several actors share a device below 1."""
    max_staleness: int = 0
    """RL: versions of the weights that rollouts may be behind. 0: synchronous; more: they are made while the learner
    trains."""
    partial: str = "finish"
    """With max_staleness, rollouts under way when new weights arrive: finish (under the weights that began them),
    continue (under the new ones) or drop (begin again under the new ones)."""
    sync_dtype: str = "float32"
    """What weights travel to the pool in: float32 or bfloat16 (half the bytes; gates stay float32)."""
    check_weights: bool = False
    """Compare every tensor on both sides after every sync."""
    max_new_tokens: int = 48
    stop: list[str] = field(default_factory=lambda: ["\n"])
    prompt_template: str = "plain"
    """plain (Question: ... Answer:) or chat (the tokenizer's chat template)."""
    start_timeout_s: float = 180.0
    timeout_s: float = 600.0
    """Deadline of one generate or trace call on an actor."""
    failure_budget: int = 3
    """Actor deaths after which a run stops."""


@dataclass
class EvaluateConfig:
    split: str = "evaluation"
    thresholds: list[float] = field(default_factory=lambda: [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    """Hazard thresholds tried on the validation split."""
    tolerance: float = 0.02
    """Chosen: the least depth whose validation accuracy is within this of the best."""
    answers: int = 12
    """Answers kept token by token for the report."""
    controls: bool = False
    """Compare the last model with exit rules that know less, at its mean depth and at its accuracy; up to 28 readings
    of the validation split and 2 of the test split per rule (docs/evaluation.md)."""
    control_policy: str = ""
    """With controls, one more of them: the policy checkpoint or rl stage directory of a run with rl.lambda_exit=0."""
    externalisation: bool = False
    """Measure how much of its reasoning each model writes down; about as much as 12 evaluations of
    externalisation_prompts problems per model (docs/evaluation.md)."""
    externalisation_prompts: int = 100
    """Test problems for that; 0: all."""
    seed: int = 0


@dataclass
class DeepspeedConfig:
    zero_stage: int = 1
    """What data-parallel ranks share out: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too (only with
    parallel.tensor = parallel.pipeline = 1)."""
    offload_optimizer: bool = False
    """Optimizer state in CPU memory; needs zero_stage >= 1."""
    gradient_clipping: float = 1.0
    """Largest gradient norm; 0: not clipped."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass
class CheckpointConfig:
    keep: int = 2
    """Newest checkpoints kept of a stage; RL also keeps the one with the best reward."""
    bad_steps: int = 5
    """Updates in a row whose gradient is not finite, after which a stage stops and leaves the batch on disk."""


@dataclass
class TrackerConfig:
    wandb: str = "auto"
    """auto (online with a key, else offline), online, offline or disabled."""
    project: str = "ee-megatron"
    tensorboard: bool = False


@dataclass
class ClusterConfig:
    nodes: int = 1
    """Nodes of a job, all together."""
    gpus_per_node: int = 0
    """0: nodes without GPUs."""
    rollout_nodes: int = 0
    """The last of the nodes, which run rollout actors only; 0: actors share the learner's nodes."""
    requeue_limit: int = 20
    """How often a job that was stopped (time limit, preemption, lost node) goes back into the queue by itself."""


@dataclass
class RunConfig:
    name: str = "???"
    """Results go to <runs>/<name>/<stage>-<hash of what the stage depends on>."""
    runs: str = "runs"
    device: str = "auto"
    """auto (cuda where there is one), cpu or cuda."""
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
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
