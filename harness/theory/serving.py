"""What serving costs at least, and how weights lie on the devices. Plain arithmetic on floats or arrays."""

from __future__ import annotations

SECONDS_PER_HOUR = 3_600


def parameters_per_node(parameters: float, nodes: float) -> float:
    """Parameters of one node when they are spread evenly."""
    return parameters / nodes


def weight_bytes_per_device(
    parameters: float, bytes_per_parameter: float, tensor_parallel: float, pipeline_parallel: float
) -> float:
    """Bytes of weights on one device when tensor x pipeline parallelism divides them evenly."""
    return parameters * bytes_per_parameter / (tensor_parallel * pipeline_parallel)


def tokens_per_second_at_peak(flops_per_token: float, devices: float, peak_flops: float) -> float:
    """No more tokens than this leave `devices` of `peak_flops` FLOP/s each: every FLOP used, memory free."""
    return devices * peak_flops / flops_per_token


def cost_per_1k_tokens(devices: float, price_per_device_hour: float, tokens_per_second: float) -> float:
    """Rent for 1,000 tokens, in the currency of the price."""
    return devices * price_per_device_hour * 1_000 / (SECONDS_PER_HOUR * tokens_per_second)


def tokens_per_second_at_cost(devices: float, price_per_device_hour: float, cost_per_1k: float) -> float:
    """The throughput at which 1,000 tokens cost so much: the inverse of `cost_per_1k_tokens`."""
    return devices * price_per_device_hour * 1_000 / (SECONDS_PER_HOUR * cost_per_1k)


def minimal_cost_per_1k_tokens(
    flops_per_token: float, devices: float, peak_flops: float, price_per_device_hour: float
) -> float:
    """The floor under the price of 1,000 tokens: the rent at peak FLOP/s."""
    fastest = tokens_per_second_at_peak(flops_per_token, devices, peak_flops)
    return cost_per_1k_tokens(devices, price_per_device_hour, fastest)


def cost_of_request(
    devices: float,
    price_per_device_hour: float,
    prompt: float,
    output: float,
    prefill_tokens_per_second: float,
    decode_tokens_per_second: float,
) -> float:
    """Rent of the devices while they prefill a prompt and decode an output, each at its own throughput."""
    seconds = prompt / prefill_tokens_per_second + output / decode_tokens_per_second
    return devices * price_per_device_hour * seconds / SECONDS_PER_HOUR


def output_over_input_cost(prefill_tokens_per_second: float, decode_tokens_per_second: float) -> float:
    """How many times an output token costs what an input token does: the two throughputs' ratio."""
    return prefill_tokens_per_second / decode_tokens_per_second


def blended_cost_per_1k(
    input_cost_per_1k: float, output_cost_per_1k: float, prompt: float, output: float
) -> float:
    """Of 1,000 tokens, input and output counted alike, at the mix of `prompt` to `output` tokens."""
    return (input_cost_per_1k * prompt + output_cost_per_1k * output) / (prompt + output)


def cost_factor_at_load(load: float, reused: float = 0.0) -> float:
    """What tokens cost over their price on busy devices, where `load` of the rented time serves.

    All rent falls on the tokens served, less what other work pays for the share `reused` of the idle time:
    (1 - reused (1 - load)) / load, which is 1 / load without any.
    """
    return (1 - reused * (1 - load)) / load


def load_at_cost_factor(factor: float, reused: float = 0.0) -> float:
    """The load below which tokens cost more than `factor` times as much: the inverse of
    `cost_factor_at_load`; a half for twice the cost, without reuse."""
    return (1 - reused) / (factor - reused)


def load_of_day(loads: list[float]) -> float:
    """Mean load of devices that are rented for the peak hour: mean over largest of what is served."""
    return sum(loads) / (len(loads) * max(loads))


def reading_tokens_per_second(words_per_minute: float, tokens_per_word: float) -> float:
    """Tokens/s that a reader keeps up with."""
    return words_per_minute * tokens_per_word / 60


def tokens_per_word(words_per_minute: float, tokens_per_second: float) -> float:
    """What a stated pair of reading speeds takes a word for: the inverse of `reading_tokens_per_second`."""
    return tokens_per_second * 60 / words_per_minute


def weight_bound_tokens_per_second(weight_bytes: float, devices: float, bytes_per_second: float) -> float:
    """No sequence gets more tokens per second than this: every weight is read for each of its tokens."""
    return devices * bytes_per_second / weight_bytes


def parameters_at_tokens_per_second(
    tokens_per_second: float, devices: float, bytes_per_second: float, bytes_per_parameter: float
) -> float:
    """The most parameters that can be read so often: the inverse of `weight_bound_tokens_per_second`."""
    return devices * bytes_per_second / (tokens_per_second * bytes_per_parameter)


def flops_per_weight_byte(batch: float, bytes_per_parameter: float) -> float:
    """Intensity of a decode step: 2 FLOP for each weight and sequence, the weight read once."""
    return 2 * batch / bytes_per_parameter


def compute_bound_batch(
    peak_flops: float,
    bytes_per_second: float,
    bytes_per_parameter: float,
    n_experts: float = 1,
    top_k: float = 1,
) -> float:
    """Tokens of a pass from which its matrices are bound by compute and no longer by reading weights.

    Where 2 T / bytes_per_parameter reaches FLOP/s over bytes/s (the ridge of the roofline, Williams et al.
    2009). Routed experts see T K / E tokens each, and so need E / K times as many, all of them being read.
    """
    return peak_flops * bytes_per_parameter / (2 * bytes_per_second) * n_experts / top_k
