"""The engine: requests come and go, and every step computes what the scheduler picks, in one forward over pages (or states).

    engine = Engine(model, params, tokenizer=tokenizer)
    first = engine.submit("Once upon a time", max_new_tokens=50)
    for piece in engine.stream(first):
        print(piece.text, end="")

A text depends on its own prompt, wishes and seed, on nothing that runs beside it. Weights may be replaced at any time (`update`): texts that
are running go on under the new ones, as if these had read what there is.

The devices are told what to compute a step ahead: while one step runs, the next is on its way to them, with tokens that only they know yet
(`Scheduler.ahead`). A text that turns out to have ended has then been computed for one token more, of which nothing is kept.
"""

import math
import time
from collections.abc import Sequence as Several
from itertools import count
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.data.tokenizers import Tokenizer
from lmx.infer import sampling as draws
from lmx.infer.blanks import Blanks
from lmx.infer.drawing import Drawing, Row
from lmx.infer.jobs import GREEDY, Begun, Completion, Door, Finish, Job, Moment, Piece
from lmx.infer.pages import Pages, Statistics
from lmx.infer.places import places, where
from lmx.infer.runners import runner
from lmx.infer.sampling import Drawn, Sampling, without
from lmx.infer.scheduler import Scheduler
from lmx.infer.sizes import Sizes
from lmx.infer.steps import Chunk, Request, Sequence, Step
from lmx.infer.stopping import Stopper
from lmx.infer.texts import VIRTUAL, check_continues, check_text, context_of, ids_of, lead_of, opening
from lmx.infer.weights import fingerprint
from lmx.kernels.devices import on_cpu
from lmx.models.config import RWKV, EncoderDecoder, Model
from lmx.models.rope import by_length
from lmx.parallel.layout import Layout


class Engine(Door):
    """Continuous batching over the one forward.

    Args:
      params: as of `lmx.infer.generate`, wherever they are, under an adapter or not; they are kept in a form of the engine's own.
      layout: tensor and pipeline devices, as of training (`lmx.infer.places`).
      devices: which; this process's first by default.
      sharing: an engine of the same model, layout and devices, whose weights this one reads too, in place of `params`; it is updated first.
      tokenizer: with one, prompts may be strings, texts come back, and strings may stop them.
      rows: texts that run at a time.
      page: tokens of a page.
      pages: of the pool, its first a scrap page; by default so many that all rows fit at a length of `longest`.
      longest: tokens of a text, prompt and all, at most; the model's context by default.
      chunk: tokens of prompts in one step, at most.
      prompts: prompts that share a step, at most.
      cache: the type of keys and values: that of the computation by default; "int8" halves it or better (each number is off by at most a
        254th of the largest of its vector).
      host_pages: pages in the host's memory for texts that are put out for want of pages; without, they are read again.
      reuse: whether texts that begin alike share pages.
      top: how many alternatives a request may ask for.
      seed: of requests that bring none.
      trace: whether `timeline` is kept.

    Raises:
      ValueError: a model that continues nothing; a layout that does not fit it.
    """

    def __init__(
        self,
        model: Model,
        params: Tree,
        *,
        layout: Layout = Layout(),
        devices: Several[jax.Device] | None = None,
        sharing: "Engine | None" = None,
        tokenizer: Tokenizer | None = None,
        rows: int = 16,
        page: int = 16,
        pages: int | None = None,
        longest: int | None = None,
        chunk: int = 256,
        prompts: int = 8,
        cache: str | None = None,
        host_pages: int = 0,
        reuse: bool = True,
        top: int = 0,
        seed: int = 0,
        trace: bool = False,
        execution: Execution = Execution(),
    ):
        model = getattr(model, "config", model)
        check_continues(model)
        self._lead = lead_of(model, params)
        context = context_of(model)
        longest = context if longest is None else longest
        for name, value in (("rows", rows), ("page", page), ("chunk", chunk), ("prompts", prompts), ("longest", longest)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if longest > context:
            raise ValueError(f"longest={longest} is more than the {context} tokens of a text of model.context={model.context}")
        if host_pages < 0:
            raise ValueError(f"host_pages={host_pages} must be at least 0")
        if not 0 <= top <= model.vocab:
            raise ValueError(f"top={top} must be at least 0 and at most the vocabulary's {model.vocab}")
        if cache is not None and jnp.dtype(cache) != jnp.int8 and not jnp.issubdtype(cache, jnp.floating):
            raise ValueError(f"cache={cache!r} is no type for keys and values: int8, or one of floating point")
        stages = places(model, params, layout, execution, devices)
        self.model, self.tokenizer, self.execution = model, tokenizer, execution
        self.longest = longest
        self.limit = model.vocab if tokenizer is None else min(tokenizer.vocab, model.vocab)
        self.top, self.reuse, self.timeline = top, reuse, [] if trace else None
        sizes = Sizes(rows, chunk, min(prompts, rows), wide=not on_cpu())
        recurrent, reading = isinstance(model, RWKV), isinstance(model, EncoderDecoder)
        each = -(-self.longest // page)
        count_of = rows * each + 1 if pages is None else pages
        self.pages = None if recurrent else Pages(count_of, page)
        self._scheduler = Scheduler(
            self.pages,
            rows,
            chunk=chunk,
            prompts=sizes.prompts,
            window=None if recurrent or self._lead.prefix else _window(model),
            states=recurrent or reading,
            host_pages=host_pages,
        )
        self._sharing, self._fingerprint = sharing, _fingerprint(params) if sharing is None else sharing._fingerprint
        dtype = cache or execution.precision.compute
        kept = {"pages": count_of, "page": page, "longest": self.longest, "host_pages": host_pages}
        self._runner = runner(model, stages, sizes, dtype=dtype, **kept)
        self._load(params)
        self._by_length = by_length(getattr(model, "rope_scaling", None))
        self._sizes, self._place = sizes, self._runner.place
        self._drawing = Drawing(model, self._place, sizes, limit=self.limit, top=top)
        self._seeds, self._numbers = np.random.default_rng(seed), count()
        self._jobs: dict[Request, Job] = {}
        self._samples: dict[Sequence, int] = {}
        self._pieces: list[Piece] = []
        self._flight: list[Begun] = []  # not read yet: one, or two of which the second is ahead
        self._read = -math.inf  # when the last that was read was

    def submit(
        self,
        prompt: Several[int] | str,
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        n: int = 1,
        stop: Several[str] = (),
        stop_ids: Several[int] = (),
        top: int = 0,
        priority: int = 0,
        start_id: int | None = None,
        bidirectional: bool = False,
        images: Array | np.ndarray | None = None,
        blanks: Blanks | None = None,
        written: int = 0,
    ) -> Job:
        """A prompt waits for its turn. For an encoder-decoder it is what the encoder reads, and the text begins behind `start_id`.

        Args:
          n: so many texts, each with draws of its own.
          stop: strings that end a text, wherever tokens are cut; they are no part of it.
          stop_ids: tokens that do.
          top: so many alternatives with each token's log-probability, which `sampling.log_probs` asks for.
          priority: lower comes first.
          bidirectional: whether the prompt's tokens see each other in both directions, as those of a prefix decoder (Dong et al., 2019). It is
            then read in one step, so it has `chunk` tokens at most.
          images: `[images, channels, height, width]`, for a model that reads them: in the order in which the prompt has places for them, each
            as many image tokens as an image takes (`LLaVA.image_tokens`).
          blanks: those of the prompt, of which the text fills one; the prompt is then read in both directions. `blanks.start` is never drawn.
          written: so many of the prompt's last tokens are of a text that goes on here. Wavelengths that depend on a prompt's length (dynamic
            RoPE) are those of what stood before them, as if the text had been written at one go.

        Raises:
          ValueError: what cannot be done, by name; the engine goes on with the rest.
        """
        counts = {"max_new_tokens": max_new_tokens, "n": n, "top": top, "priority": priority, "written": written}
        if strange := [f"{name}={value!r}" for name, value in counts.items() if not isinstance(value, Integral)]:
            raise ValueError(f"{strange[0]} must be a whole number")
        stop_ids = ids_of("stop_ids", stop_ids)
        if stop and self.tokenizer is None:
            raise ValueError(f"stop={list(stop)!r} are strings, so the engine needs a tokenizer; or give stop_ids")
        how = {"start_id": start_id, "bidirectional": bidirectional, "images": images, "blanks": blanks, "written": written}
        begun = opening(self.model, self._lead, self.read(prompt), **how)
        if blanks is not None:  # else pages could not tell what is written in one piece from the beginning of another
            sampling = without(sampling, blanks.start)
        if not 0 <= top <= self.top:
            raise ValueError(f"top={top} alternatives, and the engine was made for top={self.top}")
        if top and sampling.log_probs is None:
            raise ValueError(f"top={top} alternatives are of log-probabilities; say of which kind, in sampling.log_probs")
        draws.check(sampling, self.limit)
        if (count := len(begun.tokens)) + max_new_tokens > self.longest + (start_id is not None):
            soft = f", {some} of them virtual," if (some := begun.tokens.count(VIRTUAL)) else ""
            raise ValueError(
                f"a prompt of {count} tokens{soft} and max_new_tokens={max_new_tokens} are longer than the engine's longest={self.longest}"
                f" (model.context={self.model.context})"
            )
        stoppers = [Stopper(self.tokenizer, stop, stop_ids) if self.tokenizer else None for _ in range(n)]
        seed = int(self._seeds.integers(2**32)) if sampling.seed is None else sampling.seed
        request = Request(
            begun.tokens,
            max_new_tokens,
            n,
            priority,
            self._context(count - written, begun.key, long=False),
            self.reuse,
            begun.whole,
            begun.prefix,
            begun,
        )
        completions = [Completion() for _ in range(n)]
        sequence = self._scheduler.add(request)
        job = Job(
            next(self._numbers), request, sampling, seed, top, tuple(stop), stop_ids, completions, time.perf_counter(),
            stoppers=stoppers,
        )  # fmt: skip
        self._jobs[request] = job
        self._samples[sequence] = 0
        if self._turned(sequence):
            sequence.fingerprint = self._context(count, begun.key, long=True)
        return job

    def read(self, prompt: Several[int] | str) -> tuple[int, ...]:
        """A prompt's tokens. Raises ValueError for what is neither their ids nor, with a tokenizer, text."""
        if not isinstance(prompt, str):
            return ids_of("prompt", prompt)
        if self.tokenizer is None:
            raise ValueError("the prompt is a string, so the engine needs a tokenizer")
        check_text(prompt)
        return tuple(self.tokenizer.encode(prompt))

    def cost(self, prompt: Several[int]) -> int:
        """How many tokens are to be computed until a prompt that comes now could draw its first: those of all that is here, as long as it may
        become, and of the prompt what is in no page."""
        here = sum(s.remaining + s.request.max_new_tokens - (len(s.tokens) - len(s.request.prompt)) for s in self._all())
        found = 0
        if self.pages is not None and self.reuse and prompt and not isinstance(self.model, EncoderDecoder):
            tokens = (VIRTUAL,) * (self._lead.prefix + self._lead.prompt) + tuple(prompt)
            found = self.pages.size * len(self.pages.match(self._context(len(tokens), b"", long=False), tokens))
        return here + len(prompt) - found

    def holds(self, job: Job) -> bool:
        """Whether a request is on its way here."""
        return job.request in self._jobs

    def _all(self) -> list[Sequence]:
        return self._scheduler.running + self._scheduler.waiting

    @property
    def busy(self) -> bool:
        """Whether anything runs or waits."""
        return bool(self._all())

    @property
    def statistics(self) -> Statistics | None:
        """Of the pages; None for a recurrent model."""
        return None if self.pages is None else self.pages.statistics()

    def cancel(self, job: Job) -> None:
        """Ends a request; what is there of its texts stays."""
        self._scheduler.cancel(job.request)
        for sample, one in enumerate(job.completions):
            if one.finish is None:
                self._finish(job, sample, "cancelled", None, "")
        self._forget(job)

    def update(self, params: Tree) -> None:
        """Other weights from here on. Texts that are running go on, what they have read and written being read again; nothing that was cached
        under the old weights is found again, nor is a step finished that was begun under them. Raises ValueError for another number of virtual
        tokens than the engine began with."""
        if (lead := lead_of(self.model, params)) != self._lead:
            raise ValueError(f"params have {lead}, and the engine was made for {self._lead}; make another")
        new = _fingerprint(params) if self._sharing is None else self._sharing._fingerprint
        old, self._fingerprint = self._fingerprint, new
        self._drawing.forget([sequence.request for begun in self._flight for sequence in begun.step.draws])
        self._flight = []
        self._scheduler.drop()
        self._scheduler.restart(lambda known: known.replace(old, new, 1))
        if self.pages is not None:
            self.pages.clear()
        self._load(params)

    def _load(self, params: Tree) -> None:
        if self._sharing is None:
            self._runner.load(params)
        else:
            self._runner.share(self._sharing._runner)

    def step(self) -> list[Piece]:
        """Computes one step; gives what it, and what was cancelled before it, added to texts. Does nothing when nothing is left to do."""
        return self.finish(self.begin())

    def begin(self) -> Begun | None:
        """The first half of a step: the devices are told what to compute, and not waited for; and what to compute after it, as far as that is
        known. Then comes `finish`."""
        scheduler, flight = self._scheduler, self._flight
        while flight and flight[0].step.vain:
            step = flight.pop(0).step
            scheduler.advance(step, [()] * len(step.draws))
        if not flight and self.busy:
            flight.append(self._begun(scheduler.plan()))
        if len(flight) == 1 and not self._turning(flight[0].step) and (step := scheduler.ahead()):
            flight.append(self._begun(step))
        return flight[0] if flight else None

    def _begun(self, step: Step) -> Begun:
        started = time.perf_counter()
        self._runner.move(step)
        back = {move.target for move in step.slots_in}  # what an encoder said is read again rather than kept on the host
        for sequence in [*step.started, *(c.sequence for c in step.chunks if c.sequence.slot in back)]:
            self._runner.start(sequence)
        rows = [(i, chunk.sequence, k) for i, chunk in enumerate(step.chunks) if chunk.draws for k in range(chunk.sequence.rows)]
        take = sorted({i for i, _, _ in rows})
        hidden = self._runner.compute(step, take, self._drawing.latest, self._spans(step.chunks))
        place = {i: at for at, i in enumerate(take)}
        return Begun(step, started, rows, self._draw(hidden, [(place[i], s, k) for i, s, k in rows]) if rows else None)

    def _draw(self, hidden: Array, rows: list[tuple[int, Sequence, int]]) -> Drawn:
        """One token for each of the rows: which hidden state, whose, and which of the sequences that it is to become."""
        wished = []
        for index, sequence, k in rows:
            job, sample = self._jobs[sequence.request], self._samples[sequence] + k
            wished.append(Row(index, sequence, job.sampling, (job.seed + sample * 0x9E3779B1) % 2**32))
        return self._drawing.draw(self._runner.params, hidden, wished)

    def finish(self, begun: Begun | None) -> list[Piece]:
        """The second half: waits for what was drawn; gives what that adds to texts."""
        if self._flight and begun is self._flight[0]:
            drawn = jax.device_get(begun.drawn)
            del self._flight[0]
            self._advance(begun.step, begun.rows, drawn)
            if self.timeline is not None:
                self._mark(begun.step, begun.started)
        pieces, self._pieces = self._pieces, []
        return pieces

    def warm_up(self) -> None:
        """Compiles every program that there may be, so that no request waits for one."""
        self._runner.warm_up()
        hidden = self._place.put(jnp.zeros((self._sizes.rows, self.model.embed), self.execution.precision.compute))
        self._drawing.warm_up(self._runner.params, hidden, self.longest)

    def _advance(self, step, rows, drawn: Drawn | None) -> None:
        """Texts with what was drawn, and the scheduler with who goes on."""
        going: dict[Sequence, list[tuple[int, int]]] = {}
        for place, (_, sequence, k) in enumerate(rows):
            going.setdefault(sequence, [])
            if sequence.status != "running":  # it has ended since
                continue
            job = self._jobs[sequence.request]
            sample = self._samples[sequence] + k
            token = int(drawn.tokens[place])
            if self._written(job, sample, token, drawn, place):
                going[sequence].append((sample, token))
        order = step.draws
        outcome = self._scheduler.advance(step, [[token for _, token in going[s]] for s in order])
        for sequence in order:
            if going[sequence]:
                self._samples[sequence] = going[sequence][0][0]
        following = {s: iter(going[s][1:]) for s in order}
        for sequence, other in outcome.forked:
            self._samples[other] = next(following[sequence])[0]
        for sequence in outcome.finished:
            job, sample = self._jobs[sequence.request], self._samples[sequence]
            if job.completions[sample].finish is None:
                stopper = job.stoppers[sample]
                text = stopper.finish() if stopper else ""  # bytes that will be no character any more may end it
                self._finish(job, sample, "stop_string" if stopper and stopper.stopped_by is not None else "length", None, text)
        for sequence in [*order, *(other for _, other in outcome.forked)]:
            job = self._jobs.get(sequence.request)
            if job is not None and job.done:
                self._forget(job)
            elif (
                sequence.status == "running"
                and self._turned(sequence)
                and sequence.fingerprint != (there := self._context(len(sequence.request.prompt), sequence.request.beside.key, long=True))
            ):
                self._scheduler.renew(sequence, there)

    def _written(self, job: Job, sample: int, token: int, drawn: Drawn, place: int) -> bool:
        """Puts a token to its text; whether that goes on."""
        one, stopper = job.completions[sample], job.stoppers[sample]
        stopped = token in job.stop_ids
        if not stopped:
            one.tokens.append(token)
            if job.sampling.log_probs is not None:
                one.log_probs.append(float(drawn.log_probs[place]))
                if job.top:
                    pairs = zip(drawn.top_tokens[place], drawn.top_log_probs[place], strict=True)
                    one.top.append([(int(t), float(p)) for t, p in list(pairs)[: job.top]])
        text, reason = stopper.push(token) if stopper else ("", "stop_id" if stopped else None)
        if reason is not None:
            self._finish(job, sample, reason, None if stopped else token, text)
            return False
        one.text += text
        self._give(Piece(job, sample, token, text, None))
        return True

    def _finish(self, job: Job, sample: int, why: Finish, token: int | None, text: str) -> None:
        one = job.completions[sample]
        one.text, one.finish = one.text + text, why
        self._give(Piece(job, sample, token, text, why))

    def _give(self, piece: Piece) -> None:
        piece.job.pieces.append(piece)
        self._pieces.append(piece)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.request, None)
        self._samples = {s: n for s, n in self._samples.items() if s.request is not job.request}
        self._drawing.forget([job.request])

    def _turned(self, sequence: Sequence) -> bool:
        """Whether LongRoPE turns a text as a long one."""
        return self._by_length == "longrope" and len(sequence.tokens) > self.model.rope_scaling.original_context

    def _turning(self, step: Step) -> bool:
        """Whether a text will be turned otherwise when it has what the step draws: then what comes after is computed anew."""
        return self._by_length == "longrope" and any(len(s.tokens) == self.model.rope_scaling.original_context for s in step.draws)

    def _spans(self, chunks: list[Chunk]) -> list[int] | None:
        """For wavelengths that depend on it, how long each text is."""
        if self._by_length is None:
            return None
        long = getattr(self.model.rope_scaling, "original_context", 0) + 1
        dynamic = self._by_length == "dynamic"
        return [_read(c.sequence.request) if dynamic else long if self._turned(c.sequence) else 0 for c in chunks]

    def _context(self, prompt: int, key: bytes, *, long: bool) -> bytes:
        """What keys and values of a text depend on besides its tokens: weights, how wavelengths are stretched, and its opening's `key`."""
        stretched = prompt if self._by_length == "dynamic" and prompt > self.model.rope_scaling.original_context else int(long)
        return self._fingerprint + stretched.to_bytes(8, "little") + key

    def _mark(self, step: Step, started: float) -> None:
        before, self._read = self._read, time.perf_counter()
        self.timeline.append(
            Moment(
                max(started, before),
                self._read,
                tuple(c.sequence.order[1] for c in step.decodes),
                tuple((c.sequence.order[1], c.count) for c in step.prefills),
                tuple(s.order[1] for s in step.preempted),
                0 if self.pages is None else self.pages.statistics().in_use,
            )
        )


def _fingerprint(params: Tree) -> bytes:
    with where(params):
        return fingerprint(params)


def _read(request: Request) -> int:
    """Tokens of a prompt, those that were written behind it not among them."""
    return len(request.prompt) - request.beside.written


def _window(model: Model) -> int | None:
    """The window, where every layer has it."""
    return model.window if all(kind.startswith("local") for kind in model.pattern) else None
