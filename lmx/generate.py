"""Text from a model, as it comes.

`python -m lmx.generate PATH PROMPT [PROMPT ...] [--temperature 0.8] [...]`: PATH is the folder of a run, of a Hugging Face checkpoint, or of an
adapter of PEFT's that names its base. Several prompts are continued together and shown one after another; `-` stands for the lines of the
standard input. An encoder-decoder reads the prompt and writes its own text. A model that reads images takes `--image FILE [FILE ...]`. One that
was trained to fill blanks (GLM) fills those of a prompt, which `[MASK]` stands for.
"""

import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from lmx.core.config import ConfigError, command_line, exits_with_one_line
from lmx.core.execution import Execution
from lmx.core.precision import PrecisionName, policy
from lmx.infer.blanks import Marks, at_last, fill
from lmx.infer.engine import Engine
from lmx.infer.jobs import Job
from lmx.infer.sampling import Sampling
from lmx.infer.texts import check_text, context_of, lead_of, openings
from lmx.interop.image_files import prepared, read_preparation
from lmx.interop.marked import BLANK
from lmx.interop.tokenizers import CheckpointTokenizer
from lmx.interop.writers import Writer, load_writer
from lmx.models.vision_config import LLaVA

BOLD, DIM = 1, 2
CHUNK = 256
"""Tokens of prompts in one step, at most, where prompts may be cut."""
USAGE = 'python -m lmx.generate PATH "Once upon a time" [--temperature 0.8] ... (--help lists all)'


@dataclass(frozen=True)
class Wishes:
    """What the door takes beside folder and prompts."""

    max_new_tokens: int = 128
    """Tokens of each text, at most."""
    temperature: float = 0.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Only tokens at least this many times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens that were read or written are divided by it, others multiplied."""
    presence_penalty: float = 0.0
    """Taken from logits of tokens that were written."""
    frequency_penalty: float = 0.0
    """The same, once for each time."""
    seed: int = 0
    """Decides what is drawn; each further prompt has the next."""
    n: int = 1
    """Texts of each prompt."""
    stop: tuple[str, ...] = ()
    """Strings that end a text; they are no part of it."""
    chat: bool = False
    """Prompts are what a user says, in the chat template of the checkpoint."""
    image: tuple[str, ...] = ()
    """Files of images, which each prompt is about. Its image tokens (<image>) say where they stand; without any, before it."""
    bidirectional: bool = False
    """The tokens of a prompt see each other in both directions, as a prefix decoder was trained."""
    adapter: str | None = None
    """The folder of an adapter of PEFT's over the checkpoint."""
    merge: bool = False
    """Whether the adapter is added into the weights, which is faster."""
    precision: PrecisionName = "fp32"
    """Types of parameters and activations."""
    cache: Literal["float32", "bfloat16", "float16", "int8"] | None = None
    """The type of keys and values; None: that of activations."""
    rows: int = 16
    """Texts that run at a time, at most."""
    tokenizer: str | None = None
    """Another than the folder's: bytes, a file, or a folder."""
    step: int | None = None
    """The checkpoint of a run; None: its newest."""
    stats: bool = False
    """Whether to say, on stderr, how fast it was and how many pages it took."""


def main(argv: Sequence[str] | None = None) -> None:
    """The door. A wrong flag, folder or prompt is one line on stderr and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    given = next((i for i, word in enumerate(argv) if re.match(r"--?[A-Za-z_]", word)), len(argv))
    (*words,), flags = argv[:given], argv[given:]
    wishes, _ = command_line(Wishes(), flags, description=__doc__)
    with exits_with_one_line():
        if len(words) < 2:
            raise ConfigError(f"name a folder and at least one prompt, before any flag: {USAGE}")
        prompts = read_prompts(words[1:])
        sampling = sampling_of(wishes)
        precision = policy(wishes.precision)
        where = {"adapter": wishes.adapter, "merge": wishes.merge, "tokenizer": wishes.tokenizer, "step": wishes.step}
        writer = load_writer(words[0], **where, dtype=precision.params)
        images = read_images(writer, wishes.image)
        ids = [encoded(writer, prompt, chat=wishes.chat, images=len(wishes.image)) for prompt in prompts]
        blanks = has_blanks(writer, prompts, ids, wishes)
        engine = engine_for(writer, ids, wishes, blanks=blanks)
        how = {"max_new_tokens": wishes.max_new_tokens, "stop_ids": writer.stop_ids}
        # With one seed for all, prompts that are alike would draw alike.
        draws = [replace(sampling, seed=(wishes.seed + number) % 2**32) for number in range(len(ids))]
        started, jobs = time.perf_counter(), []
        if not blanks:
            more = {
                "n": wishes.n,
                "stop": wishes.stop,
                "bidirectional": wishes.bidirectional,
                "start_id": writer.start_id,
                "images": images,
            }
            jobs = [engine.submit(prompt, sampling=own, **how, **more) for prompt, own in zip(ids, draws, strict=True)]
    continues = writer.start_id is None and not wishes.chat
    try:
        new = show_filled(engine, ids, writer.marks, draws, wishes.n, **how) if blanks else 0
        for number, job in enumerate(jobs):
            show(engine, job, f"prompt {number + 1}" if len(jobs) > 1 else "", (prompts[number], ids[number]) if continues else None)
            new += sum(len(text.tokens) for text in job.completions)
    except KeyboardInterrupt:
        print()
        raise SystemExit(130) from None
    if wishes.stats:
        show_statistics(engine, new, time.perf_counter() - started)


def read_prompts(words: Sequence[str]) -> list[str]:
    """The prompts; `-` stands for the lines of the standard input, empty ones left out. Raises ValueError where there are none, or
    what is no text."""
    prompts = [line for word in words for line in ([line.rstrip("\n") for line in sys.stdin] if word == "-" else [word])]
    if not (prompts := [prompt for prompt in prompts if prompt]):
        raise ConfigError("there is no prompt, or an empty one; give at least one character")
    for prompt in prompts:
        check_text(prompt)
    return prompts


def sampling_of(wishes: Wishes) -> Sampling:
    """Raises ValueError for what means nothing."""
    if wishes.n < 1 or wishes.rows < 1 or wishes.max_new_tokens < 1:
        raise ConfigError(f"n={wishes.n}, rows={wishes.rows} and max_new_tokens={wishes.max_new_tokens} must be at least 1")
    if wishes.n > 1 and wishes.temperature == 0:
        raise ConfigError(f"n={wishes.n} texts at temperature=0 would all be the same; raise --temperature")
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
    return Sampling(**{name: getattr(wishes, name) for name in names})


def read_images(writer: Writer, paths: Sequence[str]) -> np.ndarray | None:
    """Images as the model takes them, `[images, channels, height, width]`; None without any. Raises ConfigError for a model that reads none."""
    if not paths:
        return None
    if not isinstance(writer.model, LLaVA):
        raise ConfigError(f"image={', '.join(paths)} for a {type(writer.model).__name__}, which reads none; leave it out")
    if writer.files is None:
        raise ConfigError(
            "--image needs the preprocessor_config.json of a Hugging Face checkpoint, and this run began with none; leave it out"
        )
    return prepared(paths, read_preparation(writer.files))


def encoded(writer: Writer, prompt: str, *, chat: bool, images: int = 0) -> list[int]:
    """Tokens of a prompt, its places for so many images as wide as these are. Raises ConfigError for a chat with what has no chat template, and for
    other than so many places."""
    if images:
        prompt = _placed(writer, prompt, images)
    if not chat:
        ids = writer.tokenizer.encode(prompt)
    elif isinstance(writer.tokenizer, CheckpointTokenizer):
        ids = writer.tokenizer.chat_ids([{"role": "user", "content": prompt}], add_generation_prompt=True)
    else:
        raise ConfigError("--chat needs the chat template of a Hugging Face checkpoint, and a run's tokenizer has none; leave it out")
    if not images:
        return ids
    if (places := ids.count(writer.model.image_token)) != images:
        raise ConfigError(f"the prompt {prompt!r} has places for {places} images, and there are {images} of --image; name as many")
    return [token for one in ids for token in [one] * (writer.model.image_tokens if one == writer.model.image_token else 1)]


def _placed(writer: Writer, prompt: str, images: int) -> str:
    """The prompt, behind as many image tokens where it has none."""
    token = writer.tokenizer.token(writer.model.image_token) if writer.model.image_token < writer.tokenizer.vocab else None
    if token is None:
        raise ConfigError(
            f"the tokenizer has no token {writer.model.image_token}, for which the model reads images; name its own with --tokenizer"
        )
    return prompt if token in prompt else token * images + f"\n{prompt}"


def has_blanks(writer: Writer, prompts: Sequence[str], ids: Sequence[Sequence[int]], wishes: Wishes) -> bool:
    """Whether prompts have blanks, which are filled then. Raises ConfigError for a model that fills none, and where not every prompt has one."""
    if writer.marks is None:
        if (mask := _mask(writer)) is not None and any(mask in prompt for prompt in ids):
            raise ConfigError(
                f"a prompt has {BLANK}, and {type(writer.model).__name__} was trained to fill no blanks, as the run of one with block positions "
                "is (data.denoising=BlankInfilling); leave it out"
            )
        return False
    there = [any(token in writer.marks.masks for token in prompt) for prompt in ids]
    if not any(there):
        return False
    if not all(there):
        raise ConfigError(f"the prompt {prompts[there.index(False)]!r} has no {BLANK}, and others have; ask for it alone")
    if wishes.stop:
        raise ConfigError(f"stop={list(wishes.stop)} are strings, and what fills a blank ends with a token; leave them out")
    return True


def _mask(writer: Writer) -> int | None:
    """The mask that a tokenizer has of its own; of an encoder-decoder, which reads it, none."""
    if writer.start_id is not None or not isinstance(writer.tokenizer, CheckpointTokenizer):
        return None
    return writer.tokenizer.id(BLANK)


def engine_for(writer: Writer, prompts: Sequence[Sequence[int]], wishes: Wishes, *, blanks: bool = False) -> Engine:
    """An engine with room for just these prompts, and for all of their texts at a time where `wishes.rows` allows. Raises ValueError where blanks
    filled are longer than the model's context."""
    lead = lead_of(writer.model, writer.params)
    begun = whole = lead.prefix + (0 if writer.start_id is not None else lead.prompt + max(map(len, prompts)))
    if blanks:
        last = openings(writer.model, lead, prompts, wishes.max_new_tokens, blanks=at_last(prompts, writer.marks, wishes.max_new_tokens))
        begun = max(len(one.tokens) for one in last)
    return Engine(
        writer.model,
        writer.params,
        tokenizer=writer.tokenizer,
        rows=max(wishes.n, min(wishes.rows, wishes.n * len(prompts))),
        longest=min(context_of(writer.model), begun + wishes.max_new_tokens),
        chunk=max(CHUNK, whole) if wishes.bidirectional or blanks else CHUNK,
        cache=wishes.cache,
        trace=wishes.stats,
        execution=Execution(precision=policy(wishes.precision)),
    )


def show(engine: Engine, job: Job, title: str, prompt: tuple[str, Sequence[int]] | None) -> None:
    """Prints a request's texts one after another, the first as it comes, behind its prompt where there is one to show."""
    for sample, text in enumerate(job.completions):
        _show_title(title, sample, len(job.completions))
        if prompt:
            _write(prompt[0], DIM)
        fresh = prompt is not None
        for piece in engine.stream(job):
            if piece.sample == sample and piece.text:
                _write((_lead(engine, prompt[1], text.tokens) if fresh else "") + piece.text)
                fresh = False
        _write("\n")


def show_filled(engine: Engine, prompts: Sequence[Sequence[int]], marks: Marks, draws: Sequence[Sampling], n: int, **how: Any) -> int:
    """Prints prompts with their blanks filled, each n times, as soon as all are; gives how many tokens are new. `how` is as of `fill`."""
    seeds = [[int(np.random.SeedSequence((own.seed, sample)).generate_state(1)[0]) for sample in range(n)] for own in draws]
    each = [{"sampling": replace(own, seed=seed)} for own, some in zip(draws, seeds, strict=True) for seed in some]
    rows = [prompt for prompt in prompts for _ in range(n)]
    filled = fill(engine, rows, marks, each, **how)
    for i, (prompt, blanks) in enumerate(zip(rows, filled, strict=True)):
        _show_title(f"prompt {i // n + 1}" if len(prompts) > 1 else "", i % n, n)
        _write(f"{engine.tokenizer.decode(blanks.filled(prompt))}\n")
    return sum(len(piece) for blanks in filled for piece in blanks.pieces)


def _show_title(title: str, sample: int, several: int) -> None:
    titles = [title] * bool(title) + [f"text {sample + 1} of {several}"] * (several > 1)
    if titles:
        _write(f"--- {', '.join(titles)}\n", BOLD)


def _write(text: str, style: int | None = None) -> None:
    """To stdout at once and as it is (rich would lay out tabs, and drop control characters); with a style on a terminal."""
    print(f"\033[{style}m{text}\033[0m" if style and sys.stdout.isatty() else text, end="", flush=True)


def _lead(engine: Engine, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The space before a text, as far as it is written, which some tokenizers leave out at the beginning of what they decode."""
    before, after = engine.tokenizer.decode(prompt), engine.tokenizer.decode([*prompt, *tokens])
    return " " if after == f"{before} {engine.tokenizer.decode(tokens)}" else ""


def show_statistics(engine: Engine, tokens: int, seconds: float) -> None:
    """Prints how fast so many new tokens came, and how many pages it took."""
    decoding = [len(moment.decoded) / (moment.end - moment.start) for moment in engine.timeline if moment.decoded and not moment.read]
    rate = f"; {statistics.median(decoding):,.1f} tokens/s in the median step" if decoding else ""
    lines = [f"{tokens:,} new tokens in {seconds:.2f} s, {tokens / seconds:,.1f} tokens/s, compiling among it{rate}"]
    if engine.pages is not None:
        most, found = max(moment.pages for moment in engine.timeline), engine.statistics.hit_rate
        lines.append(
            f"{most:,} of {engine.pages.count - 1:,} pages in use at most, of {engine.pages.size} tokens; {found:.0%} of full pages of prompts "
            "found again"
        )
    print(*lines, sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
