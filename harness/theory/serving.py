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
