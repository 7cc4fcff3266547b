"""Figures as their authors print them, each with its source. No figure of ours stands here.

Units: seconds, tokens/s, GiB where a table says so; parameters in 1e9 where a field says `billions`.
"""

from __future__ import annotations

from dataclasses import dataclass

A100_PEAK, TPU_V3_PEAK, V100_PEAK = 312e12, 123e12, 125e12
"""FLOP/s of half-precision matrices: NVIDIA A100 and V100 SXM data sheets; TPU v3 (Jouppi et al. 2020)."""


@dataclass(frozen=True)
class Megatron:
    """A row of table 1 of Narayanan et al. 2021 (SC'21), arXiv 2104.04473: A100, sequences of 2,048."""

    billions: float
    heads: int
    hidden: int
    layers: int
    tensor: int
    pipeline: int
    gpus: int
    batch: int
    """Sequences."""
    teraflops: float
    """Achieved per GPU, in 1e12 FLOP/s, the repeated forward pass included."""
    percent: float
    """Of the peak of 312e12."""


MEGATRON = (
    Megatron(1.7, 24, 2304, 24, 1, 1, 32, 512, 137, 44),
    Megatron(3.6, 32, 3072, 30, 2, 1, 64, 512, 138, 44),
    Megatron(7.5, 32, 4096, 36, 4, 1, 128, 512, 142, 46),
    Megatron(18.4, 48, 6144, 40, 8, 1, 256, 1024, 135, 43),
    Megatron(39.1, 64, 8192, 48, 8, 2, 512, 1536, 138, 44),
    Megatron(76.1, 80, 10240, 60, 8, 4, 1024, 1792, 140, 45),
    Megatron(145.6, 96, 12288, 80, 8, 8, 1536, 2304, 148, 47),
    Megatron(310.1, 128, 16384, 96, 8, 16, 1920, 2160, 155, 50),
    Megatron(529.6, 128, 20480, 105, 8, 35, 2520, 2520, 163, 52),
    Megatron(1008.0, 160, 25600, 128, 8, 64, 3072, 3072, 163, 52),
)
MT_NLG = ((2240, 60.1), (2800, 50.2), (3360, 44.4))
"""GPUs and seconds of an iteration of 1,920 sequences: Smith et al. 2022, arXiv 2201.11990, section 2.4. The
model of 530e9 parameters, 105 layers of 20,480, on 8 x 35 GPUs a replica."""
MT_NLG_BATCH = 1920


@dataclass(frozen=True)
class Korthikanti:
    """Table 3, figure 1 and table 5 of Korthikanti et al. 2022, arXiv 2205.05198, as Calculon (Isaev et al.
    2023) transcribes them for its validation: one replica on A100 of 80 GB, sequences of 2,048."""

    name: str
    hidden: int
    layers: int
    heads: int
    pipeline: int
    chunks: int
    """Of layers on one stage: interleaving."""
    batch: int
    microbatch: int
    full: float
    """Seconds of an iteration with full recomputation."""
    selective: float
    """With sequence parallelism and selective recomputation."""
    kept: float
    """GiB of activations of the first stage, nothing recomputed, without sequence parallelism."""
    kept_selective: float
    states: float
    """GiB of parameters and optimizer."""


KORTHIKANTI = (
    Korthikanti("22B", 6144, 48, 64, 1, 1, 4, 4, 1.42, 1.10, 59.25, 9.56, 45.56),
    Korthikanti("175B", 12288, 96, 96, 8, 3, 64, 1, 18.13, 13.75, 66.84, 12.35, 45.56),
    Korthikanti("530B", 20480, 105, 128, 35, 3, 280, 1, 49.05, 37.83, 114.02, 23.08, 31.64),
    Korthikanti("1T", 25600, 128, 160, 64, 1, 512, 1, 94.42, 71.49, 131.25, 26.56, 32.96),
)


@dataclass(frozen=True)
class Llama:
    """A row of table 4 of Llama 3 (Grattafiori et al. 2024, arXiv 2407.21783): 405e9 parameters on H100."""

    gpus: int
    tensor: int
    context_ways: int
    pipeline: int
    data: int
    context: int
    batch: int
    """Sequences of one data-parallel rank."""
    teraflops: float
    percent: float


LLAMA = (
    Llama(8192, 8, 1, 16, 64, 8192, 32, 430, 43),
    Llama(16384, 8, 1, 16, 128, 8192, 16, 400, 41),
    Llama(16384, 8, 16, 16, 8, 131072, 16, 380, 38),
)
LLAMA_TOKENS, LLAMA_FLOPS = 15.6e12, 3.8e25
"""The same, section 3.1 and table 1."""

PALM_TOKENS_PER_SECOND, PALM_CHIPS, PALM_BATCH = 238.3e3, 6144, 2048
PALM_MFU, PALM_MFU_WITHOUT_ATTENTION, PALM_HFU = 46.2, 45.7, 57.8
MT_NLG_MFU, MT_NLG_MFU_WITHOUT_ATTENTION = 30.2, 29.7
GPT3_MFU, GPT3_TERAFLOPS = 21.3, 24.6
"""Of V100, from 24.6e12 FLOP/s per GPU without attention."""
GOPHER_MFU, GOPHER_STEPS_PER_SECOND, GOPHER_CHIPS = 32.5, 0.0152, 4096
"""Of TPU v3. All of these: Chowdhery et al. 2022, PaLM, arXiv 2204.02311, section 4.1 and table 3."""
GOPHER_BATCH, GOPHER_PARAMETERS, GOPHER_LAYERS, GOPHER_WIDTH = 3072, 280e9, 80, 16384
"""Rae et al. 2021, arXiv 2112.11446, table 1: batches grow from 3e6 to 6e6 tokens of sequences of 2,048."""

GPT3_PARAMETERS, GPT3_TOKENS, GPT3_FLOPS, GPT3_PETAFLOP_DAYS = 174_600e6, 300e9, 3.14e23, 3.64e3
"""Brown et al. 2020, arXiv 2005.14165, table D.1."""

DEEPSEEK_TOKENS, DEEPSEEK_GPUS, DEEPSEEK_HOURS = 14.8e12, 2048, 2664e3
DEEPSEEK_LATER_HOURS, DEEPSEEK_COST = 119e3 + 5e3, 5.576e6
DEEPSEEK_BATCH, DEEPSEEK_CONTEXT = 15_360, 4096
DEEPSEEK_CACHE = 70e3
"""Bytes a token. DeepSeek-V3, arXiv 2412.19437, table 1 and sections 3.2 and 4.2; the cache: arXiv
2505.09343, table 1."""
DEEPSEEK_GFLOP = 250
"""Per token and three passes, at 2,048 tokens and full attention."""
DEEPSEEK_MFU, DEEPSEEK_MFU_HOURS, DEEPSEEK_MFU_PEAK = 21.7, 2.79e6, 1513e12
"""Of an FP8 peak, and the peak that it was taken of: half of the 3,026e12 with sparsity of an H100 PCIe
(Austin et al. 2025, How to Scale Your Model, chapter on transformers, question 7)."""


@dataclass(frozen=True)
class GptOss:
    """A column of table 1 of gpt-oss (OpenAI 2025, model card), in 1e9 parameters; GiB of the checkpoint."""

    spec: str
    mlp: float
    attention: float
    embeddings: float
    active: float
    total: float
    gib: float


GPT_OSS = (
    GptOss("gpt-oss-120b", 114.71, 0.96, 1.16, 5.13, 116.83, 60.8),
    GptOss("gpt-oss-20b", 19.12, 0.64, 1.16, 3.61, 20.91, 12.8),
)
GSHARD = (
    (2048, 60, 1000),
    (2048, 36, 600),
    (2048, 12, 200),
    (512, 36, 150),
    (512, 12, 50),
    (128, 36, 37),
    (128, 12, 12.5),
)
"""Experts, layers, 1e9 parameters: Lepikhin et al. 2020, arXiv 2006.16668, table 1."""

FORWARD_GFLOP = {
    "mixtral-8x7b": 26.57091584,
    "deepseek-v3": 83.483295744,
    "llama-3.1-70b": 144.372137984,
    "gpt3-175b": 358.791143424,
}
"""Per token at 2,048 tokens, full attention: PyTorch 2.13's FlopCounterMode over transformers 5.23.0."""
CACHE_BYTES = {
    "mixtral-8x7b": 131_072,
    "llama-3.1-70b": 327_680,
    "gpt3-175b": 4_718_592,
    "deepseek-v3": 70_272,
}
"""Bytes of keys and values a token in 16 bits: aiconfigurator 0.12.0 and llm-flops 0.0.1."""
CACHE_BYTES_GENZ, CACHE_BYTES_VIEWER = 27_328, 1.75e6
"""What GenZ and LLM-Viewer take DeepSeek-V3's for."""


@dataclass(frozen=True)
class Mixtral:
    """Milliseconds of a decode step of Mixtral 8x7B after 2,048 of 2,048 + 256 tokens, 8 H100, 16 bits."""

    batch: int
    measured: float
    """aiconfigurator 0.12.0, SILICON: tables of measured kernels, routing by a power law."""
    sol: float
    """aiconfigurator, SOL: data sheet."""
    genz: float
    llm_flops: float
    llm_analysis: float


MIXTRAL = (
    Mixtral(1, 3.10, 0.966, 2.72, 0.972, 4.09),
    Mixtral(8, 5.70, 3.589, 2.82, 1.051, 4.26),
    Mixtral(32, 6.62, 3.926, 3.14, 1.322, 4.87),
    Mixtral(128, 10.08, 5.276, 4.43, 2.404, 7.27),
)
LLAMA_70B = {
    "aiconfigurator SILICON": (231.4, 16.62),
    "aiconfigurator SOL": (158.5, 8.59),
    "GenZ": (184.8, 11.06),
    "llm-analysis": (151.7, 10.81),
}
"""Milliseconds of prefill and decode step: Llama 3.1 70B, 8 A100, one sequence of 2,048 tokens, 16 bits."""
LLM_VIEWER_70B = (1000.0, 68.6)
"""The same of LLM-Viewer on a single A100."""
DEEPSEEK_SERVED = (2276.0, 22.1, 103.2)
"""TTFT and TPOT in ms, GiB per GPU: aiconfigurator SILICON, DeepSeek-V3 on 8 H200, experts 8 ways, FP8, 32
sequences of 2,048 + 256 tokens."""


@dataclass(frozen=True)
class Pope:
    """A column of table 2 of Pope et al. 2022, arXiv 2211.05102: PaLM 540B on 64 TPU v4."""

    name: str
    batch: int
    prompt: int
    """Tokens of a prefill; 0: 64 decode steps after 2,048."""
    weights: str
    layout: str
    seconds: float
    percent: float


POPE = (
    Pope("low-latency prefill", 1, 2048, "int8-weights", "2D weight-stationary", 0.29, 43),
    Pope("low-latency decode", 64, 0, "int8-weights", "2D weight-stationary", 1.82, 14),
    Pope("high-throughput prefill", 512, 2048, "bfloat16", "weight-gathered over all chips", 85.2, 76),
    Pope("high-throughput decode", 512, 0, "bfloat16", "2D weight-stationary", 6.0, 33),
)
POPE_STEPS = 64
POPE_TOKEN, POPE_CHAT, POPE_OFFLINE = 29e-3, 1.9, 73
"""Seconds of a token with int8 weights; of 64 tokens after 64 new and 1,920 cached ones; MFU per cent
offline. The same, abstract and section 1."""
POPE_CACHE, POPE_CACHE_BATCH = 3e12, 512
"""Bytes of keys and values of a multi-head model of 500e9 parameters and more, 2,048 tokens (the same)."""

LLAMA_EFFECTIVE, LLAMA_GPUS = 90, 16_384
"""Per cent of effective training time, at least (Llama 3, section 3.3.4)."""
MEGASCALE_EFFECTIVE, MEGASCALE_GPUS, MEGASCALE_MFU = 90, 12_288, 55.2
"""Jiang et al. 2024, MegaScale, arXiv 2402.15627, abstract and section 6.3."""


@dataclass(frozen=True)
class MegaScale:
    """A row of its table 2: seconds of an iteration of a GPT of 175e9 parameters on A100, 8 x 8 GPUs a
    replica, six chunks on a stage, sequences of 2,048, a vocabulary of 64,000 (section 6.1)."""

    gpus: int
    batch: int
    megatron: float
    megascale: float


MEGASCALE = (
    MegaScale(256, 768, 40.0, 32.0),
    MegaScale(512, 768, 21.2, 16.5),
    MegaScale(768, 768, 15.2, 11.5),
    MegaScale(1024, 768, 11.9, 8.9),
    MegaScale(3072, 6144, 29.02, 23.66),
    MegaScale(6144, 6144, 14.78, 12.21),
    MegaScale(8192, 6144, 12.24, 9.56),
    MegaScale(12288, 6144, 8.57, 6.34),
)
MEGASCALE_VOCABULARY = 64_000
