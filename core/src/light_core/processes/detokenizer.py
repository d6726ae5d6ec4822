"""The detokenizer process: turns the engine's new tokens into text, finds stop strings, and tells http.

It does in a process of its own what would otherwise wait for, or hold up, a step or the event loop.
"""

import os
from pathlib import Path
from typing import Any

import zmq

from light_core.processes.arena import DETOKENIZER_READY, Arena
from light_core.processes.channels import Receiver, Sender
from light_core.processes.guards import Child, load_target, run_child
from light_core.processes.messages import Open, Progress, StepUpdate, StopHit, TextUpdate, TextUpdates, ToDetokenizer
from light_core.text.decoder import Detokenizer, IncrementalDecoder

__all__ = ["DetokenizerLoop"]

IDLE_WAIT_S = 1.0
BACKLOG_WAIT_S = 0.005
UPDATES_PER_MESSAGE = 1024
PROMPT_TAIL = 16
"""Prompt tokens that decoding looks at."""


class _Output:
    """One output on its way to text."""

    __slots__ = ("decoder", "generation", "include_stop", "num_tokens", "prompt_len", "stopped")

    def __init__(self, message: Open, decoder: IncrementalDecoder | None) -> None:
        self.generation, self.prompt_len, self.include_stop = message.generation, message.prompt_len, message.include_stop
        self.decoder = decoder
        self.num_tokens = 0
        self.stopped = False


class DetokenizerLoop:
    """Reads the engine's updates and passes them on as text, until told to stop.

    Args:
        detokenizer: None gives outputs without text.
        arena: shared requests.
        inbox: from the engine.
        to_http, to_engine: where text and stop-string hits go.
        wake_fd: an eventfd that `stop` writes to.
    """

    def __init__(
        self, detokenizer: Detokenizer | None, arena: Arena, inbox: Receiver[Any], to_http: Sender, to_engine: Sender, wake_fd: int
    ) -> None:
        self._detokenizer, self._arena, self._inbox, self._wake_fd = detokenizer, arena, inbox, wake_fd
        self._to_http, self._to_engine = to_http, to_engine
        self._outputs: dict[int, _Output] = {}
        self._texts: dict[tuple[int, int], TextUpdate] = {}
        self._hits: list[StopHit] = []
        self._stopping = False

    def stop(self) -> None:
        """Ends `run`. Any thread."""
        self._stopping = True
        os.eventfd_write(self._wake_fd, 1)

    def run(self) -> None:
        """The loop. Blocks on the socket when there is nothing to do."""
        while not self._stopping:
            for message in self._inbox.drain(limit=64):
                if isinstance(message, Open):
                    self._open(message)
                else:
                    self._update(message)
            self._flush()
            self._inbox.wait(BACKLOG_WAIT_S if self._texts or self._hits else IDLE_WAIT_S, self._wake_fd)

    def _open(self, message: Open) -> None:
        slot = message.slot
        if not self._arena.is_current(slot, message.generation):
            return
        decoder = None
        if self._detokenizer is not None and message.detokenize:
            tail = self._arena.rows[slot, max(0, message.prompt_len - PROMPT_TAIL) : message.prompt_len].tolist()
            decoder = IncrementalDecoder(self._detokenizer, tail, message.skip_special_tokens, message.stop, message.include_stop)
        self._outputs[slot] = _Output(message, decoder)

    def _update(self, message: StepUpdate) -> None:
        for progress in message.updates:
            slot, generation = progress.slot, progress.generation
            if not self._arena.is_current(slot, generation):
                continue
            output = self._outputs.get(slot)
            if output is not None and output.generation == generation:
                self._advance(output, progress)
            elif progress.finish_reason is not None:  # aborted before the engine had heard of it
                self._put(TextUpdate(slot, generation, "", 0, 0, False, progress.finish_reason, error=progress.error))
            if progress.finish_reason is not None:
                self._close(slot, generation)

    def _advance(self, output: _Output, progress: Progress) -> None:
        """Decodes what is new of one output."""
        if output.stopped:
            return
        start, stop = output.num_tokens, max(output.num_tokens, progress.num_tokens)
        new = self._arena.output(progress.slot, output.prompt_len, start, stop)
        finish_reason, stop_reason, text = progress.finish_reason, progress.stop_token, ""
        hit, logprobs = None, progress.logprobs
        if output.decoder is not None:
            ended_by_token = progress.stop_token is not None and not output.include_stop
            text, hit = output.decoder.push(new[:-1] if ended_by_token else new)
            if hit is not None:
                new = new[: output.decoder.num_tokens - start]
                logprobs = logprobs[: len(new)] if logprobs is not None else None
            elif finish_reason is not None:
                text += output.decoder.finish()
                hit = output.decoder.stop_hit
        output.num_tokens = start + len(new)
        update = TextUpdate(progress.slot, progress.generation, text, start, output.num_tokens, False, finish_reason, stop_reason)
        update.num_cached_tokens, update.logprobs, update.prompt_logprobs = progress.num_cached_tokens, logprobs, progress.prompt_logprobs
        update.error, update.param = progress.error, progress.param
        update.queue_s, update.prefill_s = progress.queue_s, progress.prefill_s
        if hit is not None:
            update.finish_reason, update.stop_reason, output.stopped = "stop", hit, True
            if finish_reason is None:
                self._hits.append(StopHit(progress.slot, progress.generation))
        self._put(update)

    def _close(self, slot: int, generation: int) -> None:
        """Neither the engine nor this process touches the slot after this."""
        self._outputs.pop(slot, None)
        pending = self._texts.get((slot, generation))
        if pending is None:
            count = int(self._arena.control["num_tokens"][slot])
            self._texts[slot, generation] = pending = TextUpdate(slot, generation, "", count, count, False)
        pending.closed = True
        self._arena.control["closed"][slot] = generation

    def _put(self, new: TextUpdate) -> None:
        """Adds to what http is to be told, merged with what it has not been told yet."""
        old = self._texts.get((new.slot, new.generation))
        if old is not None:
            new.text, new.start = old.text + new.text, old.start
            new.num_cached_tokens = max(old.num_cached_tokens, new.num_cached_tokens)
            new.prompt_logprobs = new.prompt_logprobs or old.prompt_logprobs
            if old.logprobs is not None:
                new.logprobs = old.logprobs + (new.logprobs or [])
            if old.prefill_s is not None:
                new.queue_s, new.prefill_s = old.queue_s, old.prefill_s
        self._texts[new.slot, new.generation] = new

    def _flush(self) -> None:
        while self._hits and self._to_engine.send(self._hits[0]):
            del self._hits[0]
        if not self._texts:
            return
        plain = [key for key, update in self._texts.items() if update.prompt_logprobs is None]
        runs = [plain[first : first + UPDATES_PER_MESSAGE] for first in range(0, len(plain), UPDATES_PER_MESSAGE)]
        runs += [[key] for key, update in self._texts.items() if update.prompt_logprobs is not None]
        for run in runs:
            if not self._to_http.send(TextUpdates([self._texts[key] for key in run])):
                return
            for key in run:
                del self._texts[key]


def main(child: Child) -> None:
    """Loads the tokenizer and runs until the supervisor says stop."""
    boot = child.boot
    detokenizer = None
    if not boot.config.skip_tokenizer_init:
        detokenizer = Detokenizer(load_target(boot.settings.tokenizer)(boot.config, boot.refs))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    folder, limit = Path(boot.folder), boot.settings.max_message_bytes
    inbox: Receiver[Any] = Receiver(context, folder, "detokenizer", ToDetokenizer, limit)
    to_engine = Sender(context, folder, "engine", limit, high_water_mark=4 * boot.settings.num_slots)
    loop = DetokenizerLoop(
        detokenizer, child.arena, inbox, Sender(context, folder, "http", limit), to_engine, os.eventfd(0, os.EFD_CLOEXEC)
    )
    child.listen(lambda command: loop.stop())
    child.loaded()
    child.arena.board.set_word(DETOKENIZER_READY, 1)
    loop.run()


if __name__ == "__main__":
    run_child(main)
