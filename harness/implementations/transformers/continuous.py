"""transformers' continuous batching on one device: paged attention, and its own thread, scheduler and cache.

What one request may say for itself is temperature, top_k, top_p and the tokens that end it; greedy is top_k
= 1. The rest is refused before anything is served. An answer that does not come is an error: the engine has a
deadline, because it does not answer what was cancelled or what it lost.
"""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from harness.implementations.protocols import Unsupported
from harness.implementations.registry import describe
from harness.implementations.transformers.library import library
from harness.reference.engine import Arrival, Completion, Iteration, Limits, Request, Served

SETTINGS = frozenset(("temperature", "top_k", "top_p", "eos"))
DEADLINE = 10.0
"""Seconds without a pass or an answer after which the answers that are missing are given up."""

NEARLY = math.nextafter(1.0, 0.0)
"""Of temperature and top_p: at 1 exactly the engine makes no processor that a request could then set."""

OWN_SIZE = {"num_blocks": 256, "page_size": 16, "max_batch_tokens": 512}
"""Left to itself it takes six tenths of the machine's memory."""


def is_offered(module: Any) -> bool:
    """Whether its paged cache knows every kind of layer of this module."""
    library()
    from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

    try:
        group_layers_by_attn_type(module.config.get_text_config())
    except ValueError:
        return False
    return hasattr(module, "init_continuous_batching")


def start(module: Any, limits: Limits | None, generator: torch.Generator) -> ContinuousSession:
    """A running engine. Raises Unsupported for limits that its config cannot say, or if it does not start."""
    said: dict[str, Any] = dict(OWN_SIZE)
    if limits is not None:
        if limits.batching != "continuous":
            raise Unsupported("transformers' continuous batching has no static batching")
        said = {
            "num_blocks": limits.pages,
            "page_size": limits.page_size,
            "max_batch_tokens": limits.chunk,
            "max_requests_per_batch": limits.sequences,
            "allow_block_sharing": limits.prefix_sharing,
        }
    transformers = library()
    seed = int(torch.randint(2**31, (), generator=generator))
    try:
        config = transformers.ContinuousBatchingConfig(per_request_processors=True, seed=seed, **said)
        defaults = transformers.GenerationConfig(
            do_sample=True,
            temperature=NEARLY,
            top_k=int(module.config.vocab_size),
            top_p=NEARLY,
            eos_token_id=-1,
            max_new_tokens=1,
        )
        manager = module.init_continuous_batching(
            generation_config=defaults, continuous_batching_config=config
        )
        session = ContinuousSession(manager, int(module.config.vocab_size))
        session.begin()
    except (ValueError, NotImplementedError) as error:
        raise Unsupported(f"transformers' continuous batching does not start: {describe(error)}") from error
    return session


@dataclass
class ContinuousSession:
    """A manager and its thread; what it has cached stays from run to run."""

    manager: Any
    vocab_size: int
    runs: int = 0
    log: list[_Pass] = field(default_factory=list)
    cached: dict[str, int] = field(default_factory=dict)
    """Tokens of a prompt that were found in the cache, by the name of the request."""
    feed: Callable[[], None] = lambda: None

    def begin(self) -> None:
        """Start the thread, which from now on calls `feed` before each iteration."""
        body = self.manager._generation_loop_body  # noqa: SLF001  # the one place that is passed every time

        def watched(processor: Any, bootstrapping: bool) -> bool:
            self.feed()
            return bool(body(processor, bootstrapping))

        self.manager._generation_loop_body = watched  # noqa: SLF001
        ready = threading.Event()
        self.feed = ready.set
        # Its thread is a daemon if the one that starts it is: else a session that nobody closed, or a loop
        # that hangs, would keep the process from ending.
        starter = threading.Thread(target=self.manager.start, daemon=True)
        starter.start()
        starter.join()
        while not ready.wait(0.05):
            if not self.manager.is_running():
                raise RuntimeError(str(self.manager.background_thread_status.fatal_error))
        self.feed = lambda: None
        watch(self.manager.batch_processor, self.log, self.cached)

    def run(self, arrivals: Sequence[Arrival]) -> Served:
        """Serve them all, each handed in before the iteration of its time. Raises Unsupported for a setting
        that is not among SETTINGS."""
        from harness.implementations.transformers.generation import require_expressible

        for arrival in arrivals:
            require_expressible(arrival.request, SETTINGS)
        self.runs += 1
        self.log.clear()
        names = [f"{self.runs}.{index}" for index in range(len(arrivals))]
        answers: dict[int, Completion] = {}
        due = sorted(range(len(arrivals)), key=lambda i: (arrivals[i].at, i))
        sent, skipped = set[int](), 0.0
        cancelled: dict[int, tuple[int, ...]] = {}

        def feed() -> None:
            nonlocal skipped
            now = len(self.log) + skipped
            idle = not self.manager.batch_processor.has_pending_requests()
            if due and idle and arrivals[due[0]].at > now and sent <= answers.keys() | cancelled.keys():
                skipped += arrivals[due[0]].at - now  # nothing happens until then
                now = arrivals[due[0]].at
            while due and arrivals[due[0]].at <= now:
                index = due.pop(0)
                sent.add(index)
                self._add(names[index], arrivals[index])
            active = self.manager.batch_processor.scheduler.active_requests
            for index in sent - cancelled.keys() - answers.keys():
                after, gone = arrivals[index].cancel_after, arrivals[index].cancel_at
                state = active.get(names[index])
                generated = () if state is None else tuple(state.to_generation_output().generated_tokens)
                if (after is not None and len(generated) >= after) or (gone is not None and now >= gone):
                    cancelled[index] = generated
                    self.manager.cancel_request(names[index])

        self.feed = feed
        self.manager._wake_up_loop.set()  # noqa: SLF001  # else it looks for work ten times a second
        self._collect(arrivals, names, answers, cancelled)
        self.feed = lambda: None
        timeline = [entry.iteration(names) for entry in self.log]
        return Served([self._counted(names[i], answers[i]) for i in range(len(arrivals))], timeline)

    def _counted(self, name: str, answer: Completion) -> Completion:
        preemptions = sum(name in entry.preempted for entry in self.log)
        return replace(answer, cached_tokens=self.cached.get(name, 0), preemptions=preemptions)

    def close(self) -> None:
        """Stop the thread; at once, for a thread that hangs does not end by itself."""
        self.feed = self.manager._wake_up_loop.set  # noqa: SLF001  # an idle loop looks up ten times a second
        self.feed()
        gc.freeze()  # `stop` collects garbage: in a process with so much in it that takes longer than serving
        try:
            self.manager.stop(block=True, timeout=5, hard_stop=True)
        finally:
            gc.unfreeze()

    def _add(self, name: str, arrival: Arrival) -> None:
        request, sampling = arrival.request, arrival.request.sampling
        greedy = sampling.temperature == 0
        self.manager.add_request(
            list(request.prompt),
            request_id=name,
            max_new_tokens=request.max_tokens,
            eos_token_id=list(request.eos) or -1,
            temperature=1.0 if greedy else float(sampling.temperature),
            top_k=1 if greedy else (sampling.top_k if sampling.top_k > 0 else self.vocab_size),
            top_p=float(sampling.top_p),
        )

    def _collect(
        self,
        arrivals: Sequence[Arrival],
        names: Sequence[str],
        answers: dict[int, Completion],
        cancelled: dict[int, tuple[int, ...]],
    ) -> None:
        index_of = {name: index for index, name in enumerate(names)}
        last, seen = time.monotonic(), 0
        while len(answers) < len(arrivals):
            result = self.manager.get_result(timeout=0.05)
            for index in cancelled.keys() - answers.keys():  # such a request is never answered
                answers[index] = Completion(cancelled[index], "cancelled")
            if len(self.log) > seen:
                last, seen = time.monotonic(), len(self.log)
            if result is None:
                dead = not self.manager.is_running() and self.manager.output_router.output_queue.empty()
                if dead or time.monotonic() - last > DEADLINE:
                    why = f"the engine neither computed nor answered for {DEADLINE:g} s"
                    if dead:
                        why = f"the engine ended: {self.manager.background_thread_status.fatal_error}"
                    for index in range(len(arrivals)):
                        answers.setdefault(index, Completion((), "error", error=why))
                continue
            found = index_of.get(result.request_id)
            if found is None:
                continue  # of a run before
            last = time.monotonic()
            if result.is_finished() and found not in answers:
                answers[found] = completed(arrivals[found].request, result)


def completed(request: Request, result: Any) -> Completion:
    """What the engine answered, without the token that ended it."""
    tokens = tuple(result.generated_tokens)
    if result.error is not None:
        return Completion(tokens, "error", error=str(result.error))
    if tokens and tokens[-1] in request.eos:
        return Completion(tokens[:-1], "stop")
    return Completion(tokens, "length")


@dataclass(frozen=True)
class _Pass:
    """One forward pass, by the engine's names."""

    active: tuple[str, ...]
    waiting: int
    prefill: int
    decode: int
    pages: int
    preempted: tuple[str, ...]

    def iteration(self, names: Sequence[str]) -> Iteration:
        index_of = {name: index for index, name in enumerate(names)}
        return Iteration(
            running=tuple(index_of[n] for n in self.active if n in index_of),
            waiting=self.waiting,
            prefill_tokens=self.prefill,
            decode_tokens=self.decode,
            pages_used=self.pages,
            preempted=tuple(index_of[n] for n in self.preempted if n in index_of),
        )


def watch(processor: Any, log: list[_Pass], cached: dict[str, int]) -> None:
    """Let a batch processor append each of its passes to `log`, and enter what its cache held in `cached`."""
    search = processor.cache.search_prefix_match
    prepare, offload = processor.prepare_next_batch, processor.offloading_manager.offload_requests
    preempted: list[str] = []

    def offload_requests() -> bool:
        before = set(processor.scheduler.active_requests)
        offloaded = bool(offload())
        preempted.extend(sorted(before - set(processor.scheduler.active_requests)))
        return offloaded

    def prepare_next_batch() -> bool:
        ready = bool(prepare())
        if ready:
            io, scheduler, cache = processor.inputs_and_outputs, processor.scheduler, processor.cache
            states = [(f.state, f.query_length) for f in io.requests_in_batch]
            decode = sum(n for s, n in states if s.generated_tokens)
            log.append(
                _Pass(
                    active=tuple(scheduler.active_requests),
                    waiting=len(scheduler.waiting_requests),
                    prefill=sum(n for _, n in states) - decode,
                    decode=decode,
                    pages=round(cache.num_blocks * (1 - cache.compute_free_capacity())),
                    preempted=tuple(preempted),
                )
            )
            preempted.clear()
        return ready

    def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
        found = cached[request_id] = int(search(request_id, prompt_ids))
        return found

    processor.cache.search_prefix_match = search_prefix_match
    processor.prepare_next_batch = prepare_next_batch
    processor.offloading_manager.offload_requests = offload_requests
