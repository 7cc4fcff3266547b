"""The leak, worked: the model's shape, and its training run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from harness.spec.hardware import Format, load_hardware
from harness.theory import communication, failures, flops, parameters, pipeline, routing, serving, training
from harness.theory.activations import kept, stage_activations
from harness.theory.layout import Layout
from harness.theory.sharding import rank_parameters, split
from harness.theory.states import States, training_memory
from harness.validation.shapes import leaked
from harness.validation.worked import Worked

EXPERT, ATTENTION, ACTIVE, TOTAL, EXPERTS, TOP_K = 111e9, 55e9, 280e9, 1.8e12, 16, 2
TOKENS, FLOPS, GPUS, BATCH, CONTEXT, COST = 13e12, 2.15e25, 25_000, 60e6, 8192, 63e6
RUN = Layout(8, 15, 208, zero_stage=1)
"""What 24,960 of the 25,000 GPUs make; its middle stages have neither embedding nor unembedding."""
MIDDLE, LAST = 7, 14
A100 = "a100-80gb"


def shape() -> Iterator[Worked]:
    """Parameters, width and FLOPs."""
    model = leaked()
    parts = parameters.by_component(model)
    experts, attention = parts["experts.weights"], parts["attention.projections"]
    width, each = model.d_model, experts / EXPERTS
    yield Worked(
        "16 x 111e9 + 55e9", "1.831e12", experts + attention, "parameters", f"{experts:,} + {attention:,}"
    )
    tables = parts["embedding"]
    yield Worked(
        "one table of embeddings", "1.08e9", tables, "parameters", f"{model.vocab_size:,} x {width:,}"
    )
    chosen = parameters.active_by_component(model)["experts.weights"]
    yield Worked(
        "2 x 111e9 + 55e9",
        "277e9",
        chosen + attention,
        "parameters",
        f"{chosen:,} + {attention:,} for a token",
    )
    squares = attention / width**2
    yield Worked(
        "width from 55e9 of multi-head attention",
        "10,704",
        (ATTENTION / squares) ** 0.5,
        "",
        f"{squares:.0f} d^2 in all layers",
    )
    squares = each / width**2
    yield Worked(
        "width from 111e9 an expert, d_ff = 4 d, two matrices",
        "10,753",
        (EXPERT / squares) ** 0.5,
        "",
        f"{squares:.0f} d^2 in all layers",
    )
    yield Worked("an expert at d_model 10752", "110.98e9", each, "parameters", f"{squares:.0f} x {width:,}^2")
    yield Worked("attention there, multi-head", "55.49e9", attention, "parameters", f"4 x 120 x {width:,}^2")
    single = parameters.by_component(leaked(heads=84, kv_heads=1))["attention.projections"]
    queries = 2 * model.n_layers * width**2
    both = f"queries and outputs {queries:,}, one key and one value head of 128 {single - queries:,}"
    yield Worked("attention there, multi-query", "28e9", single, "parameters", both)
    yield Worked("the same, printed to three digits", "27.9e9", single, "parameters", both)
    yield Worked(
        "width at which multi-query attention has 55e9",
        "15.1e3",
        (ATTENTION / (2 * model.n_layers)) ** 0.5,
        "",
        "2 d^2 in each of 120 layers, key and value heads left out",
    )
    one = leaked(heads=84, kv_heads=1)
    wider = one.model_copy(update={"attention": one.attention.model_copy(update={"n_heads": 168})})
    twice = parameters.by_component(wider)["attention.projections"]
    how = f"168 query heads of 128, one key and one value head, at {width:,}"
    yield Worked("multi-query attention with queries twice as wide", "55e9", twice, "parameters", how)
    wide = 14848
    yield Worked(
        "d_ff over d_model at d_model 14848",
        "2.1",
        EXPERT / (2 * model.n_layers * wide**2),
        "x",
        "111e9 over 2 matrices of 120 layers",
    )
    forward = 2 * (chosen + attention)
    full = flops.forward_per_token(model, 0)
    yield Worked(
        "FLOP of a token, forward",
        "554e9",
        forward,
        "FLOP",
        f"2 for each parameter; with routers and unembedding {full:,}: 560 TFLOP is 1,000 times that",
    )
    dense = 2 * (experts + attention)
    yield Worked("a dense model of that size", "3.66e12", dense, "FLOP", "2 for each of all parameters")
    yield Worked("dense over sparse", "6.6", dense / forward, "x", "as 3,700 over 560")


def training_run() -> Iterator[Worked]:
    """FLOPs, days, cost, memory, batch and network."""
    yield from _compute()
    yield from _memory()
    yield from _batch()
    yield from _network()


def _compute() -> Iterator[Worked]:
    model, peak = leaked(), load_hardware(A100).peak_flops("bfloat16")
    active = parameters.active_by_component(model)
    worked = active["experts.weights"] + active["attention.projections"]
    yield Worked("6 x 277e9 x 13e12", "2.161e25", 6 * worked * TOKENS, "FLOP", f"6 x {worked:,} x 13e12")
    yield Worked("6 x 280e9 x 13e12", "2.184e25", 6 * ACTIVE * TOKENS, "FLOP", "of the leak's own 280e9")
    yield Worked(
        "parameters that 2.15e25 implies", "275.6e9", FLOPS / (6 * TOKENS), "", "2.15e25 / (6 x 13e12)"
    )
    causal = flops.forward_by_component(model, 1, CONTEXT, attention="causal")
    scores = (causal["attention.scores"] + causal["attention.values"]) / CONTEXT
    yield Worked(
        "attention's share at 8k, causal",
        "3.8",
        100 * scores / (2 * worked),
        "%",
        f"{scores:.4g} over {2 * worked:.4g} FLOP a token",
    )
    for mfu, shown in ((32, "99.7"), (36, "88.6")):
        found = training.days(FLOPS, GPUS, peak, mfu / 100)
        yield Worked(
            f"days at {mfu} % of 25,000 A100",
            shown,
            found,
            "days",
            f"2.15e25 / (25,000 x {peak:g} x {mfu} %)",
        )
    for days, shown in ((90, "35.4"), (100, "31.9"), (105, "30.4")):
        found = 100 * training.implied_mfu(FLOPS, GPUS, peak, days)
        yield Worked(
            f"utilisation at {days} days", shown, found, "%", f"2.15e25 / (25,000 x {peak:g} x {days} days)"
        )
    for days, shown in ((90, "54e6"), (100, "60e6"), (105, "63e6")):
        found = training.cost(GPUS, days, 1.0)
        yield Worked(f"cost of {days} days", shown, found, "USD", f"25,000 x {days} x 24 h at 1 USD")
    least, most = (training.cost(GPUS, days, 1.0) for days in (100, 90))
    for name, shown, below in (("least", "5", least), ("most", "15", most)):
        found = 100 * (COST / below - 1)
        how = f"63e6 over {below:,.0f} USD"
        yield Worked(f"63e6 USD is off by, at {name}", shown, found, "%", how)
    found = COST / least
    yield Worked("price of an A100-hour at which 100 days cost 63e6", "1.05", found, "USD", "63e6 over 60e6")
    for shown, figure in (("0.5", 6 * worked * TOKENS), ("1.6", 6 * ACTIVE * TOKENS)):
        how = f"{figure:.4g} over 2.15e25, of {figure / (6 * TOKENS):,.0f} parameters"
        yield Worked("training FLOPs over the leak's", shown, 100 * (figure / FLOPS - 1), "%", how)
    h100, gpus, days = load_hardware("h100"), 8192, 55
    found = training.cost(gpus, days, 2.0)
    yield Worked("cost on 8,192 H100", "21.63e6", found, "USD", "8,192 x 55 x 24 h at 2 USD")
    forms: tuple[tuple[Format, str], ...] = (("bfloat16", "55.8"), ("fp8", "27.9"))
    for form, shown in forms:
        top = h100.peak_flops(form)
        found = 100 * training.implied_mfu(FLOPS, gpus, top, days)
        yield Worked(
            f"utilisation there, of {form}", shown, found, "%", f"2.15e25 / (8,192 x {top:g} x 55 days)"
        )


def _memory() -> Iterator[Worked]:
    model = leaked()
    even = serving.weight_bytes_per_device(TOTAL, 2, 8, 15) / 1e9
    yield Worked("weights of a GPU, 1.8e12 evenly", "30.0", even, "GB", "1.8e12 x 2 / (8 x 15)")
    inner, ends = (2 * sum(rank_parameters(model, RUN, stage).values()) / 1e9 for stage in (MIDDLE, LAST))
    yield Worked(
        "of an inner stage", "30.52", inner, "GB", "its 8 layers over 8 tensor ranks, norms and routers whole"
    )
    yield Worked("of the first or last stage", "30.79", ends, "GB", "and an eighth of a table")
    yield Worked("what a table adds", "0.27", ends - inner, "GB", "100,352 x 10,752 x 2 / 8")
    for stage, gradient, gigabytes in ((1, 2, "61.9"), (1, 4, "92.4"), (2, 2, "31.5"), (3, 2, "1.2")):
        one = training_memory(
            model,
            replace(RUN, zero_stage=stage),
            context=CONTEXT,
            microbatches=35,
            stage=MIDDLE,
            states=States(gradient=gradient),
        )
        states = [part / 1e9 for part in (one.weights, one.gradients, one.optimizer)]
        name = "FSDP" if stage == 3 else f"ZeRO-{stage}"
        shown = "weights {:.2f}, gradients {:.2f}, optimizer {:.2f}".format(*states)
        yield Worked(f"{name}, {8 * gradient}-bit gradients", gigabytes, sum(states), "GB", shown)
    layer = 34 * CONTEXT * model.d_model / 8
    whole = replace(RUN, recompute="selective", expert_parallel=8)
    moe = kept(model, whole, CONTEXT, dropout=True).moe_layer
    held, _ = stage_activations(model, whole, context=CONTEXT, microbatches=35, dropout=True)
    how = f"34 s b h / t is {layer / 1e9:.3f} GB for a layer with one feed-forward network: "
    how += f"{layer * 8 * 15 / 1e9:.0f} GB of 8 layers and 15 microbatches; with two experts a token, and a "
    how += f"copy of it for each, a layer keeps {moe / 1e9:.3f} GB"
    yield Worked("activations, selective recomputation, first stage", "45", held / 1e9, "GB", how)
    for sequence, gigabytes in ((True, "2.6"), (False, "21")):
        full = replace(RUN, recompute="full", sequence_parallel=sequence)
        size = kept(model, full, CONTEXT).moe_layer
        over = "over the tensor ranks" if sequence else "whole on each tensor rank"
        yield Worked(
            f"full recomputation, {over}",
            gigabytes,
            size * 8 * 15 / 1e9,
            "GB",
            f"{size:,.0f} bytes x 8 layers x 15",
        )


def _batch() -> Iterator[Worked]:
    replicas = GPUS / (8 * 15)
    yield Worked("replicas", "208.33", replicas, "", "25,000 / (8 x 15): 208 take 24,960 GPUs")
    yield Worked("replicas of 24,000 GPUs", "200", 24_000 / (8 * 15), "", "24,000 / (8 x 15)")
    yield Worked("layers of a stage", "8", leaked().n_layers / 15, "layers", "120 / 15")
    each = routing.tokens_per_expert(BATCH, EXPERTS, TOP_K)
    yield Worked("tokens of an expert in a batch", "7.5e6", each, "tokens", "60e6 x 2 / 16")
    tokens = BATCH / RUN.data_parallel
    yield Worked("tokens of a replica", "288e3", tokens, "tokens", "60e6 / 208")
    for context, count, name in ((CONTEXT, "35", "8k"), (2048, "141", "2k")):
        found = round(tokens / context)
        yield Worked(
            f"sequences of {name} of a replica", count, tokens / context, "", f"{tokens:,.0f} / {context:,}"
        )
        idle = pipeline.bubble("1f1b", 15, found)
        shown = "40" if context == CONTEXT else "9.9"
        yield Worked(f"bubble of 1F1B at {found}", shown, 100 * idle, "% of ideal", f"14 / {found}")
    bubble = pipeline.efficiency(pipeline.bubble("1f1b", 15, 35))
    yield Worked("share of the time that stages work", "71", 100 * bubble, "%", "1 / (1 + 14/35)")
    between = failures.mean_time_between_failures(RUN.devices, failures.LLAMA_3_RATE)
    for checkpoint, interval, kept_share in (
        (10, "6.4", "0.874"),
        (60, "15.6", "0.808"),
        (300, "35", "0.681"),
    ):
        best = failures.young_interval(checkpoint, between) / 60
        exact = failures.optimal_interval(checkpoint, between) / 60
        left = failures.best_goodput(checkpoint, between, 600.0)
        how = f"a failure every {between / 3600:.2f} h, restarts of 600 s"
        first = f"Young's, to first order; the exact optimum is {exact:.2f}"
        yield Worked(f"checkpoints of {checkpoint} s: interval", interval, float(best), "min", first)
        yield Worked(f"checkpoints of {checkpoint} s: goodput", kept_share, float(left), "", how)
    left = float(failures.best_goodput(60.0, between, 600.0))
    how = f"{bubble:.4f} x {left:.4f} x 0.58, each unrounded; the hand rounds the first two up"
    yield Worked("bubble x failures x kernels at 58 %", "34", 100 * bubble * left * 0.58, "%", how)


def _network() -> Iterator[Worked]:
    model, hardware = leaked(), load_hardware(A100)
    dense, experts = split(rank_parameters(model, RUN, MIDDLE))
    sent = communication.data_traffic(RUN, hardware, dense, experts, 35)
    seconds = float(communication.total_seconds(sent, hardware))
    peak = hardware.peak_flops("bfloat16")
    active = parameters.active_by_component(model)
    work = 6 * (active["experts.weights"] + active["attention.projections"]) * BATCH
    step = work / (GPUS * peak * 0.34)
    yield Worked("time of a step at 34 %", "37.6", step, "s", f"{work:.4g} FLOP / (25,000 x {peak:g} x 0.34)")
    gigabytes = float(communication.total_sent(sent)) / 1e9
    yield Worked(
        "gradients and weights of ZeRO-1", "2.4", seconds, "s", f"{gigabytes:.1f} GB of a rank at 25 GB/s"
    )
    yield Worked("their share of the step", "6.5", 100 * seconds / step, "%", f"{seconds:.3f} / {step:.1f} s")
    whole = replace(RUN, sequence_parallel=False, expert_tensor_parallel=8)
    ways: tuple[communication.Direction, ...] = ("forward", "backward")
    payload = CONTEXT * model.d_model * 2
    reductions = [
        one
        for way in ways
        for one in communication.tensor_traffic(model, whole, hardware, CONTEXT, way, routed=True)
        if one.payload == payload
    ]
    yield Worked("an all-reduce of tensor parallelism", "176e6", payload, "bytes", "8,192 x 10,752 x 2")
    each = sum(float(one.seconds(hardware)) for one in reductions)
    calls = sum(float(one.calls) for one in reductions)
    tensor = 8 * 35 * each
    sent_bytes = sum(float(one.sent) for one in reductions)
    bare = 8 * 35 * sent_bytes / hardware.island_link.bandwidth
    how = (
        f"8 layers x 35 x {calls:.0f} all-reduces of a layer: {bare:.3f} s of bytes, the rest latency, which "
    )
    how += "the hand leaves out"
    yield Worked("tensor parallelism in a step", "1.15", tensor, "s", how)
    yield Worked("its share of the step", "3", 100 * tensor / step, "%", f"{tensor:.3f} / {step:.1f} s")
