"""Published counts: parameters, their parts, checkpoints, caches, and bytes of training."""

from __future__ import annotations

from dataclasses import replace

from harness.spec import load
from harness.spec.architecture import Architecture
from harness.theory import memory, parameters
from harness.theory.activations import kept, stage_activations
from harness.theory.layout import Layout
from harness.theory.precision import PRECISIONS
from harness.theory.sharding import rank_parameters
from harness.theory.states import States, serving_memory, training_memory
from harness.validation import published
from harness.validation.held import Row, Section
from harness.validation.published import Korthikanti
from harness.validation.shapes import CONTEXT, gpt, gshard

GIB = 2**30
OF_ENDS = ("embedding", "positions", "unembedding")
"""Components that a figure of layers alone leaves out."""


def megatron() -> Section:
    """Parameters of the ten models of Megatron-LM's table 1."""
    rows = []
    for one in published.MEGATRON:
        counted = parameters.total(gpt(one.hidden, one.layers, one.heads)) / 1e9
        rows.append(Row(f"{one.layers} layers of {one.hidden:,}", one.billions, counted, "1e9 parameters"))
    return Section(
        "Megatron-LM, table 1: parameters",
        "Narayanan et al. 2021, arXiv 2104.04473, table 1",
        "d_ff four times the width, 51,200 tied embeddings, 2,048 learned positions, biases; nothing fitted",
        tuple(rows),
    )


def gpt_oss() -> Section:
    """Table 1 of gpt-oss's model card."""
    rows = []
    for one in published.GPT_OSS:
        architecture = load(one.spec).architecture
        parts = parameters.by_component(architecture)

        def of(*prefixes: str, parts: dict[str, int] = parts) -> float:
            return sum(count for name, count in parts.items() if name.startswith(prefixes)) / 1e9

        size = serving_memory(architecture, Layout(), PRECISIONS["mxfp4-experts"], batch=1, context=1).weights
        active = parameters.active(architecture, "no-input-embedding")
        unit = "1e9 parameters"
        rows += [
            Row(f"{one.spec}: MLP", one.mlp, of("experts", "router"), unit),
            Row(f"{one.spec}: attention", one.attention, of("attention"), unit),
            Row(
                f"{one.spec}: embedding and unembedding", one.embeddings, of("embedding", "unembedding"), unit
            ),
            Row(f"{one.spec}: active", one.active, active / 1e9, unit),
            Row(f"{one.spec}: total", one.total, parameters.total(architecture) / 1e9, unit),
            Row(f"{one.spec}: checkpoint", one.gib, size / GIB, "GiB"),
        ]
    return Section(
        "gpt-oss, table 1: parts and checkpoints",
        "OpenAI 2025, gpt-oss model card, table 1",
        "active: without the input embedding; checkpoints: experts in MXFP4, 4.25 bits, the rest in 16; "
        "nothing fitted",
        tuple(rows),
    )


def sparse() -> Section:
    """Table 1 of GShard: experts alone, which are nearly all."""
    rows = []
    for experts, layers, billions in published.GSHARD:
        counted = parameters.total(gshard(experts, layers), "experts") / 1e9
        rows.append(Row(f"{experts:,} experts, {layers} layers", billions, counted, "1e9 parameters"))
    return Section(
        "GShard, table 1: parameters",
        "Lepikhin et al. 2020, arXiv 2006.16668, table 1",
        "experts' matrices alone, in every other layer, width 1,024 and d_ff 8,192 (from memory of the "
        "paper): the table's figures are round and below; nothing fitted",
        tuple(rows),
    )


def caches() -> Section:
    """Bytes of keys and values of a token."""
    rows = [
        Row(name, size, memory.kv_cache_bytes_per_token(load(name).architecture, "bfloat16"), "bytes")
        for name, size in published.CACHE_BYTES.items()
    ]
    deepseek = load("deepseek-v3").architecture
    latent = memory.kv_cache_bytes_per_token(deepseek)
    wide = 2 * deepseek.n_layers * deepseek.d_model * memory.BYTES[deepseek.dtype]
    each = published.CACHE_BYTES_GENZ / deepseek.n_layers / memory.BYTES[deepseek.dtype]
    rows += [
        Row(
            "deepseek-v3, as GenZ has it",
            published.CACHE_BYTES_GENZ,
            latent,
            "bytes",
            f"that would be {each:.0f} elements a layer, and the latent and its rotary key are "
            f"{memory.cached_width(deepseek)}",
        ),
        Row(
            "deepseek-v3, as LLM-Viewer has it",
            published.CACHE_BYTES_VIEWER,
            latent,
            "bytes",
            f"keys and values as wide as d_model, {wide:,} bytes, in the place of latents",
        ),
    ]
    return Section(
        "Keys and values of one token",
        "aiconfigurator 0.12.0, llm-flops 0.0.1, GenZ, LLM-Viewer, as run",
        "16 bits; nothing fitted",
        tuple(rows),
    )


def korthikanti_run(one: Korthikanti) -> tuple[Architecture, Layout, int]:
    """A model of their table 3 with its layout and microbatches. GPT-3's vocabulary is not theirs."""
    layout = Layout(
        8,
        one.pipeline,
        microbatch=one.microbatch,
        schedule="interleaved" if one.chunks > 1 else "1f1b",
        virtual_stages=one.chunks,
        flash=False,
    )
    return gpt(one.hidden, one.layers, one.heads), layout, one.batch // one.microbatch


def korthikanti() -> Section:
    """Figure 1 of Korthikanti et al. 2022: bytes of the first stage."""
    rows = []
    for one in published.KORTHIKANTI:
        architecture, layout, microbatches = korthikanti_run(one)
        for name, gib, way in (
            ("nothing recomputed", one.kept, replace(layout, sequence_parallel=False, recompute="none")),
            (
                "sequence parallelism, selective recomputation",
                one.kept_selective,
                replace(layout, sequence_parallel=True, recompute="selective"),
            ),
        ):
            held, _ = stage_activations(
                architecture, way, context=CONTEXT, microbatches=microbatches, dropout=True
            )
            # Their figure is of layers alone.
            ends = kept(architecture, way, CONTEXT, dropout=True)
            flying: float = min(one.pipeline, microbatches)
            if one.chunks > 1:
                flying *= 1 + (one.pipeline - 1) / (one.pipeline * one.chunks)
            held -= flying * ends.embedding + (one.pipeline == 1) * ends.head
            rows.append(Row(f"{one.name}: activations, {name}", gib, held / GIB, "GiB"))
        found = training_memory(
            architecture, layout, context=CONTEXT, microbatches=microbatches, states=States(gradient=4)
        )
        counts = rank_parameters(architecture, layout)
        each = (found.weights + found.gradients + found.optimizer) / sum(counts.values())
        layers = sum(counts.values()) - sum(counts[name] for name in OF_ENDS)
        rows.append(Row(f"{one.name}: parameters and optimizer", one.states, layers * each / GIB, "GiB"))
    return Section(
        "Korthikanti et al. 2022, figure 1: memory of the first stage",
        "arXiv 2205.05198, figure 1 and table 3, as Calculon transcribes them",
        "of the layers alone, as in the figure: no embedding, no head; 18 bytes a parameter (gradients in "
        "32 bits), dropout; nothing fitted",
        tuple(rows),
    )
