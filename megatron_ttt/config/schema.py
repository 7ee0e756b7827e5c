"""The whole configuration as dataclasses: one owner for every key, its type and its default.

Hydra composes ``configs/`` into a :class:`Config`; ``validate.py`` checks what types cannot say.
``MISSING`` marks what a model file must fill. Nothing here imports torch.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from megatron_ttt.rule import UpdateRule
from megatron_ttt.scan_words import ScanAlgorithm, SequenceOrder

HF_SCHEME = "hf:"  # in front of a Hugging Face folder: checkpoint.load, +model


class Family(Enum):
    """Which Hugging Face architecture a model mirrors (conversion and checks depend on it)."""

    qwen3 = "qwen3"
    llama = "llama"
    qwen2 = "qwen2"
    mistral = "mistral"


class RopeScaling(Enum):
    none = "none"
    llama3 = "llama3"
    yarn = "yarn"


class AttentionBackend(Enum):
    """``auto`` takes Transformer Engine when it is installed and a GPU is present, else torch."""

    auto = "auto"
    torch = "torch"
    transformer_engine = "transformer_engine"


class TTTMode(Enum):
    in_place = "in_place"
    off = "off"


class Precision(Enum):
    """``auto``: bf16 with fp32 master weights on a GPU, fp32 on a CPU; bf16 works there as well."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class CommPrecision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class Recompute(Enum):
    none = "none"
    selective = "selective"
    full = "full"


class Trainable(Enum):
    """Which parameters a run changes; the others keep their bytes and cost no gradient.

    ``fast_layers``: those of the layers with fast weights. ``target_generator``: only what fast
    weights add to a model.
    """

    all = "all"
    fast_layers = "fast_layers"
    target_generator = "target_generator"


class Schedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Toggle(Enum):
    """A switch that may follow from the rest of the configuration."""

    auto = "auto"
    on = "on"
    off = "off"


class Bos(Enum):
    """The mark at the beginning of a document or prompt: ``model``, what its tokenizer adds itself.

    ``add``: the token that the tokenizer names for it; ``none``: nothing.
    """

    model = "model"
    add = "add"
    none = "none"


class OptimizerForm(Enum):
    """How a checkpoint lays out optimizer state, and so at which layouts a run goes on from it.

    ``fully_reshardable``: at any; every rank gathers its tp and pp part on the host to save it.
    ``dp_reshardable``: at other dp and cp sizes; every rank saves what it holds.
    """

    fully_reshardable = "fully_reshardable"
    dp_reshardable = "dp_reshardable"


class TokenizerKind(Enum):
    bytes = "bytes"
    huggingface = "huggingface"


class DataSource(Enum):
    """``files``: the prefixes in ``data.path``. ``python_stdlib``: a corpus built on first use."""

    files = "files"
    python_stdlib = "python_stdlib"


class ChangedData(Enum):
    """What to do when a run would resume on other data: end, or go on at the same sample number."""

    refuse = "refuse"
    accept = "accept"


class WandbMode(Enum):
    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass
class RopeConfig:
    base: float = 10000.0
    scaling: RopeScaling = RopeScaling.none
    factor: float = 1.0
    original_max_positions: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass
class ModelConfig:
    """Architecture of the pretrained decoder, in Hugging Face's terms."""

    name: str = MISSING
    family: Family = MISSING
    layers: int = MISSING
    hidden_size: int = MISSING
    ffn_hidden_size: int = MISSING
    heads: int = MISSING
    kv_groups: int = MISSING
    head_dim: int = MISSING
    vocab_size: int = MISSING
    max_positions: int = MISSING
    norm_epsilon: float = 1e-6
    qk_norm: bool = False
    attention_bias: bool = False
    tied_embeddings: bool = False
    sliding_window: int | None = None  # tokens a query sees, itself included; null: all before it
    initializer_range: float = 0.02
    rope: RopeConfig = field(default_factory=RopeConfig)
    attention: AttentionBackend = AttentionBackend.auto


@dataclass
class FastLayers:
    """Which layers have fast weights."""

    mode: TTTMode = TTTMode.in_place
    layers: list[int] | None = None  # null: every sixth, rule.default_layers; from 0


@dataclass
class TTTConfig(UpdateRule, FastLayers):
    """Keys ``ttt.*``: the layers with fast weights, and the update rule that they follow."""


@dataclass
class TokenizerConfig:
    kind: TokenizerKind = TokenizerKind.huggingface
    name: str | None = None  # folder or hub name, for kind=huggingface
    bos: Bos | None = None  # null: as the data were prepared; else what they have to agree with


@dataclass
class Boundaries:
    """What the boundary between two documents of a row does: keys ``data.*``."""

    reset_attention: bool = True  # attention does not cross document boundaries
    reset_positions: bool = False  # positions restart at each document
    reset_fast_weights: bool = True  # fast weights return to W0 at each document
    mask_document_end: bool = False  # do not count the loss of predicting across a boundary


@dataclass
class DataConfig(Boundaries):
    source: DataSource = DataSource.files
    path: Any = None  # prefix, list of prefixes, or {prefix: weight} of .bin/.idx pairs
    split: str = "99,1,0"  # train, validation, test shares of the documents
    cache_dir: str | None = None  # built indices and generated corpora; null: outputs/cache
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    changed: ChangedData = ChangedData.refuse  # a resume on other data than the checkpoint's
    workers: int = 2


@dataclass
class ParallelConfig:
    tp: int = 1
    cp: int = 1
    pp: int = 1
    sequence_parallel: Toggle = Toggle.auto  # auto: on when tp > 1
    cp_order: SequenceOrder = SequenceOrder.zigzag
    scan: ScanAlgorithm = ScanAlgorithm.auto
    scan_precision: CommPrecision = CommPrecision.fp32
    scan_constants: str | None = None  # file of measured alpha and beta, for scan=auto
    cp_comm_type: str = "p2p"  # Transformer Engine's own context parallelism
    distributed_optimizer: bool = True
    # sent while others are computed; null: on a GPU, and gathering where there is a share to gather
    overlap_grad_reduce: bool | None = None
    overlap_param_gather: bool | None = None
    bucket_size: int | None = None  # parameters reduced or gathered at once; null: Megatron's rule
    timeout_s: int = 1800


@dataclass
class OptimizerConfig:
    lr: float = 5e-6
    target_lr_factor: float = 1.0  # of what fast weights add to a model, its target generator
    min_lr: float = 0.0
    schedule: Schedule = Schedule.cosine
    warmup_steps: int | None = None  # null: warmup_fraction of train.steps
    warmup_fraction: float = 0.02
    decay_fraction: float = 1.0  # of train.steps, after which the rate stays at min_lr
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class PassConfig:
    """How rows go through a model, trained or not: keys ``train.*``."""

    seed: int = 1234
    seq_length: int = 4096
    micro_batch_size: int = 1
    precision: Precision = Precision.auto
    recompute: Recompute = Recompute.none
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    loss_tokens: int | None = None  # tokens that have logits at a time; null: a whole micro-batch


@dataclass
class TrainConfig(PassConfig):
    steps: int = 1000
    global_batch_size: int = 8
    trainable: Trainable = Trainable.all
    eta_warmup_steps: int = 0  # steps over which eta rises to ttt.eta; the first has a share of it


@dataclass
class CheckpointConfig:
    interval: int | None = 500  # steps between checkpoints; null: only at the end
    load: str | None = None  # start from these weights: a checkpoint folder, or hf:FOLDER
    keep_last: int | None = None
    keep_every: int | None = None
    async_save: bool = False
    # of all checkpoints but the one after the last step, which loads at any layout
    periodic: OptimizerForm = OptimizerForm.fully_reshardable


@dataclass
class ValidationConfig:
    interval: int | None = None  # steps between validations; null: none
    batches: int = 8  # global batches per validation


@dataclass
class LoggingConfig:
    interval: int = 1  # steps between reports; each writes the rows of all steps since the last
    tensorboard: bool = False
    wandb: WandbMode = WandbMode.disabled
    wandb_project: str = "megatron_ttt"
    wandb_entity: str | None = None
    plot: bool = False  # draw loss.png at the end
    sample_ids: bool = False  # note which samples each step read, in samples.jsonl
    peak_tflops_per_device: float | None = None  # for MFU; null: not reported


@dataclass
class RunConfig:
    name: str = "${model.name}"
    dir: str = "outputs/${run.name}"
    resume: str = "auto"  # never | auto | path of a checkpoint folder
    deterministic: bool = False
    dry_run: bool = False  # print what would be built, build nothing


@dataclass
class ComputeConfig:
    """What a model computes and on which ranks, whether it is trained or only read."""

    model: ModelConfig = field(default_factory=ModelConfig)
    ttt: TTTConfig = field(default_factory=TTTConfig)
    data: Boundaries = field(default_factory=Boundaries)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: PassConfig = field(default_factory=PassConfig)


@dataclass
class Config(ComputeConfig):
    """A run of training: what is computed, on what, and what becomes of it."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
