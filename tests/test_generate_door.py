"""The door `python -m lmx.generate`."""

import io
import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from lmx import generate as door
from lmx import interop
from lmx.core.params import is_spec
from lmx.core.tree import map_named
from lmx.data.denoising import BlankInfilling, SpanCorruption
from lmx.data.recipe import Data
from lmx.infer import generate
from lmx.infer.blanks import Marks
from lmx.infer.dense import continued
from lmx.infer.sampling import Sampling
from lmx.interop.checkpoint import Model
from lmx.interop.families import FAMILIES
from lmx.interop.image_files import prepared, read_preparation
from lmx.interop.writers import load_writer
from lmx.models.config import EncoderDecoder, Transformer
from lmx.models.families import functions
from lmx.train.checkpoints import Checkpoints, Manager
from lmx.train.experiment import Experiment
from lmx.train.logging import write_record
from lmx.train.objectives import CausalLM, Seq2Seq
from lmx.train.state import TrainState

SMALL = Transformer(vocab=257, layers=2, embed=16, heads=2, mlp=16, context=64)
T5 = {
    "model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1, "n_positions": 64,
    "feed_forward_proj": "relu", "decoder_start_token_id": 5, "eos_token_id": 1, "is_encoder_decoder": True,
}  # fmt: skip


def random(model, seed=0):
    """Weights large enough that texts differ."""
    rng = np.random.default_rng(seed)
    table = functions(model).specs(model)
    return map_named(lambda _, spec: jnp.asarray(0.5 * rng.normal(size=spec.shape), jnp.float32), table, is_leaf=is_spec)


def write_run(run, experiment, *steps, data=None):
    write_record(run, experiment, sources={}, data=data or {})
    with Manager(run / "checkpoints", Checkpoints()) as manager:
        for step in steps:
            state = TrainState(jnp.int32(step), jax.random.key(0), random(experiment.model, step), {}, {})
            manager.save(step, state, {"example": 0})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "plays"
    write_run(folder, Experiment(name="plays", data=Data(train="", tokenizer="bytes"), model=SMALL, objective=CausalLM()), 3, 7)
    return folder


@pytest.fixture(scope="module")
def hub(root, tmp_path_factory):
    """A llama with a SentencePiece vocabulary and a chat template."""
    folder = tmp_path_factory.mktemp("hub")
    files = root / "tests" / "data_files"
    for path in (files / "tokenizers" / "llama").iterdir():
        shutil.copyfile(path, folder / path.name)
    shutil.copyfile(files / "chat_templates" / "chatml.jinja", folder / "chat_template.jinja")
    model = Model(replace(SMALL, vocab=interop.load_tokenizer(folder).vocab), "llama")
    interop.save(model, random(model.config), folder)
    return folder


def printed(capsys, *argv) -> str:
    door.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_continues_a_prompt_from_the_newest_step_of_a_run(run, capsys):
    prompt = "ROMEO."
    writer = load_writer(run)
    (text,) = generate(SMALL, random(SMALL, 7), [prompt], max_new_tokens=12, stop_ids=[256], tokenizer=writer.tokenizer)
    (other,) = generate(SMALL, random(SMALL, 3), [prompt], max_new_tokens=12, stop_ids=[256], tokenizer=writer.tokenizer)
    assert text != other
    assert (writer.stop_ids, writer.start_id) == ((256,), None)
    assert printed(capsys, run, prompt, "--max-new-tokens", 12) == f"{prompt}{text}\n"
    assert printed(capsys, run, prompt, "--max-new-tokens", 12, "--step", 3) == f"{prompt}{other}\n"


def test_several_prompts_and_texts_come_one_after_another(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("first\n\nsecond\n"))
    argv = ["-", "third", "--max-new-tokens", 6, "--n", 2, "--temperature", 1.5, "--rows", 3]
    door.main([str(word) for word in (run, *argv, "--stats")])
    out, err = capsys.readouterr()
    heads = [line for line in out.splitlines() if line.startswith("---")]
    assert heads == [f"--- prompt {p}, text {t} of 2" for p in (1, 2, 3) for t in (1, 2)]
    parts = out.split("--- prompt ")[1:]
    assert [part.split("\n", 1)[1][:5] for part in parts] == ["first"] * 2 + ["secon"] * 2 + ["third"] * 2
    assert len(set(parts)) == 6
    assert "36 new tokens in" in err
    assert "pages in use at most, of 16 tokens" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("first\n\nsecond\n"))
    assert printed(capsys, run, *argv) == out
    monkeypatch.setattr("sys.stdin", io.StringIO("first\n\nsecond\n"))
    assert printed(capsys, run, *argv, "--seed", 1) != out


def test_streams_as_it_comes(run, monkeypatch):
    """What is printed before the engine's last step."""
    seen, said = [], io.StringIO()
    monkeypatch.setattr("sys.stdout", said)
    step = door.Engine.step
    monkeypatch.setattr(door.Engine, "step", lambda engine: (seen.append(len(said.getvalue())), step(engine))[1])
    door.main([str(run), "ROMEO.", "--max-new-tokens", "12"])
    assert len(seen) == 12
    assert 6 < seen[6] < seen[-1] < len(said.getvalue())


def test_a_stop_string_and_other_wishes_are_heeded(run, capsys):
    text = printed(capsys, run, "ROMEO.", "--max-new-tokens", 12).removeprefix("ROMEO.").rstrip("\n")
    stop = text[4:6]
    assert printed(capsys, run, "ROMEO.", "--max-new-tokens", 12, "--stop", stop) == f"ROMEO.{text[: text.index(stop)]}\n"
    for wishes in (["--repetition-penalty", 5], ["--presence-penalty", 9, "--frequency-penalty", 2], ["--temperature", 3, "--min-p", 0.01]):
        assert printed(capsys, run, "ROMEO.", "--max-new-tokens", 12, *wishes) != f"ROMEO.{text}\n"
    for wishes in (["--temperature", 3, "--top-k", 1], ["--temperature", 1, "--top-p", 1e-6], ["--cache", "float32"]):
        assert printed(capsys, run, "ROMEO.", "--max-new-tokens", 12, *wishes) == f"ROMEO.{text}\n"
    assert printed(capsys, run, "ROMEO.", "--max-new-tokens", 4, "--cache", "int8", "--precision", "bf16").startswith("ROMEO.")


def test_a_checkpoint_chats_in_its_own_template(hub, capsys):
    tokenizer, (model, params) = interop.load_tokenizer(hub), interop.load(hub)
    how = {"max_new_tokens": 8, "stop_ids": tokenizer.stop_ids, "tokenizer": tokenizer}
    ids = tokenizer.encode("the king")
    (new,) = generate(model, params, [ids], **how)
    whole = tokenizer.decode([*ids, *new])
    assert printed(capsys, hub, "the king", "--max-new-tokens", 8) == f"{whole}\n"
    asked = tokenizer.chat_ids([{"role": "user", "content": "the king"}], add_generation_prompt=True)
    (new,) = generate(model, params, [asked], **how)
    assert printed(capsys, hub, "the king", "--max-new-tokens", 8, "--chat") == f"{tokenizer.decode(new)}\n"


def test_a_word_behind_the_prompt_keeps_its_space(hub):
    """SentencePiece leaves out the space before the first piece that it decodes."""
    tokenizer = interop.load_tokenizer(hub)
    ids = tokenizer.encode("the king")
    engine = door.engine_for(load_writer(hub), [ids], door.Wishes(max_new_tokens=1))
    the = tokenizer.encode("the", special=False)
    assert door._lead(engine, ids, the) == " "
    assert door._lead(engine, ids, [tokenizer.eos_id, *the]) == " "  # behind a token that is no text
    assert door._lead(engine, ids, [tokenizer.id("s")]) == ""


def test_an_imported_run_has_its_checkpoint_s_tokenizer(hub, capsys, tmp_path):
    interop.import_run(hub, tmp_path / "imported")
    assert printed(capsys, tmp_path / "imported", "the king", "--max-new-tokens", 8, "--chat") == printed(
        capsys, hub, "the king", "--max-new-tokens", 8, "--chat"
    )


def test_an_encoder_decoder_begins_as_its_checkpoint_says(root, capsys, tmp_path):
    for path in (root / "tests" / "data_files" / "tokenizers" / "t5").iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    tokenizer = interop.load_tokenizer(tmp_path)
    model = Model(FAMILIES["t5"].read(T5 | {"vocab_size": tokenizer.vocab}), "t5", json.dumps(T5 | {"vocab_size": tokenizer.vocab}))
    params = random(model.config)
    interop.save(model, params, tmp_path)
    (new,) = generate(model, params, [tokenizer.encode("the king")], max_new_tokens=8, stop_ids=[1], start_id=5, tokenizer=tokenizer)
    assert load_writer(tmp_path).start_id == 5
    assert printed(capsys, tmp_path, "the king", "--max-new-tokens", 8) == f"{tokenizer.decode(new)}\n"


def test_an_encoder_decoder_s_run_begins_as_it_was_trained(capsys, tmp_path):
    sides = replace(SMALL, vocab=300)
    model = EncoderDecoder(**{k: getattr(sides, k) for k in ("vocab", "layers", "embed", "heads", "mlp", "context")}, encoder=sides)
    data = Data(train="", tokenizer="bytes", packing="first_fit", denoising=SpanCorruption(start=257, eos=256, sentinels=(299, 258)))
    write_run(tmp_path / "t5", Experiment(name="t5", data=data, model=model, objective=Seq2Seq()), 1)
    writer = load_writer(tmp_path / "t5")
    assert (writer.start_id, writer.stop_ids) == (257, (256,))


def test_an_encoder_decoder_s_run_reads_and_writes_its_sentinels(tmp_path):
    """They are behind the tokenizer's last token."""
    sides = replace(SMALL, vocab=260)
    model = EncoderDecoder(**{k: getattr(sides, k) for k in ("vocab", "layers", "embed", "heads", "mlp", "context")}, encoder=sides)
    data = Data(train="", tokenizer="bytes", packing="first_fit", denoising=SpanCorruption(start=257, eos=256, sentinels=(259, 258)))
    write_run(tmp_path / "t5", Experiment(name="t5", data=data, model=model, objective=Seq2Seq()), 0)
    writer, ids = load_writer(tmp_path / "t5"), [*b"so", 259, *b" it", 258]
    assert writer.tokenizer.encode("so<extra_id_0> it<extra_id_1>") == ids
    how = {"max_new_tokens": 8, "start_id": 257, "stop_ids": writer.stop_ids, "sampling": Sampling(0, logit_bias=((259, 8), (258, 8)))}
    ((bare,),), ((one,),) = (
        door.Engine(model, writer.params, tokenizer=reads).generate([ids], **how) for reads in (None, writer.tokenizer)
    )
    assert one.tokens == bare.tokens
    assert one.text.startswith("<extra_id_0><extra_id_1>")
    assert writer.tokenizer.decode([*ids, 256, 257]) == "so<extra_id_0> it<extra_id_1>"


MASK, PIECE, END = 257, 258, 259
FILLS = replace(SMALL, vocab=264, context=48, positions="learned", block_positions=True, norm="layernorm", bias=True)


@pytest.fixture(scope="module")
def glm(tmp_path_factory):
    """A run that learned to fill blanks; its tokenizer knows nothing of them."""
    folder, blanks = tmp_path_factory.mktemp("blanks") / "glm", BlankInfilling(MASK, PIECE, END)
    data = Data(train="", tokenizer="bytes", packing="first_fit", denoising=blanks)
    write_run(folder, Experiment(name="glm", data=data, model=FILLS, objective=CausalLM()), 4)
    return folder


def test_blanks_of_a_prompt_are_filled(glm, capsys):
    params, marks = random(FILLS, 4), Marks((MASK,), PIECE, END)
    ids = [[*b"to ", MASK, *b" or ", MASK, *b"!"], [MASK]]
    never = tuple(range(260, 264))  # which only pad the vocabulary
    how = {"max_new_tokens": 5, "blanks": marks, "stop_ids": [256], "suppress_ids": never}
    wanted = [bytes(id for id in one if id < 256).decode(errors="replace") for one in generate(FILLS, params, ids, **how)]
    assert wanted[0] != "to  or !"
    said = printed(capsys, glm, "to [MASK] or [MASK]!", "[MASK]", "--max-new-tokens", 5)
    assert said == f"--- prompt 1\n{wanted[0]}\n--- prompt 2\n{wanted[1]}\n"
    several = printed(capsys, glm, "to [MASK] or [MASK]!", "--max-new-tokens", 5, "--temperature", 2, "--n", 2)
    first, second = several.removeprefix("--- text 1 of 2\n").rstrip("\n").split("\n--- text 2 of 2\n")
    assert first != second
    # Without any, a prompt is continued.
    assert printed(capsys, glm, "to", "--max-new-tokens", 3).startswith("to")


def test_the_end_of_a_piece_ends_it_where_the_tokenizer_does_not_know_it(glm):
    params = random(FILLS, 4)
    params["embed"] = params["embed"].at[END].multiply(30)
    writer = replace(load_writer(glm), params=params)
    ids = [writer.tokenizer.encode("to [MASK]!")]
    engine = door.engine_for(writer, ids, door.Wishes(max_new_tokens=8), blanks=True)
    (filled,) = door.fill(engine, ids, writer.marks, [{"sampling": Sampling(0)}], max_new_tokens=8)
    assert len(filled.pieces[0]) < 8


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["to [MASK]", "or"], "the prompt 'or' has no [MASK], and others have; ask for it alone"),
        (["to [MASK]", "--stop", "x"], "stop=['x'] are strings, and what fills a blank ends with a token"),
        (["to [MASK] or [MASK]", "--max-new-tokens", "20"], "prompt 0 begins with 31 tokens"),
    ],
)
def test_blanks_that_cannot_be_filled_are_refused(glm, prompts, message, capsys):
    with pytest.raises(SystemExit) as stop:
        door.main([str(glm), *prompts])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_that_fills_no_blanks_says_so(hub, capsys, tmp_path):
    shutil.copytree(hub, tmp_path / "masks")
    model, params = interop.load(hub)
    reads = interop.load_tokenizer(hub).with_tokens(["[MASK]"])
    reads.save(tmp_path / "masks")
    interop.save(*interop.resize_vocabulary(model, params, reads.vocab), tmp_path / "masks")
    with pytest.raises(SystemExit):
        door.main([str(tmp_path / "masks"), "the [MASK]"])
    assert "a prompt has [MASK], and Transformer was trained to fill no blanks" in capsys.readouterr().err
    assert printed(capsys, hub, "the [MASK]", "--max-new-tokens", 2).startswith("the [MASK]")  # words there


@pytest.fixture(scope="module")
def adapters(hub):
    """Beside their base: LoRA, a soft prompt and a prefix."""
    model, params = interop.load(hub)
    shape = {"token_dim": 16, "num_layers": 2, "num_attention_heads": 2, "num_transformer_submodules": 1, "num_virtual_tokens": 3}
    settings = {
        "lora": {"peft_type": "LORA", "target_modules": ["q_proj", "down_proj"], "r": 2, "lora_alpha": 4},
        "prompt": {"peft_type": "PROMPT_TUNING"} | shape,
        "prefix": {"peft_type": "PREFIX_TUNING"} | shape,
    }
    for seed, (name, said) in enumerate(settings.items()):
        adapter = interop.new_adapter(model, params, said | {"base_model_name_or_path": hub.name}, jax.random.key(0))
        rng = np.random.default_rng(seed)
        values = jax.tree.map(lambda a, rng=rng: jnp.asarray(0.5 * rng.normal(size=a.shape), a.dtype), adapter.values)
        interop.save_adapter(adapter.replace(values=values), hub.parent / name)
    return hub.parent


@pytest.mark.parametrize("name", ["lora", "prompt", "prefix"])
def test_an_adapter_is_over_the_checkpoint_that_is_named_or_that_it_names(hub, adapters, capsys, name):
    tokenizer, (model, params) = interop.load_tokenizer(hub), interop.load(hub)
    adapted = interop.adapt(params, interop.load_adapter(adapters / name, model))
    prompts = ["the king", "and so"]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    how = {"max_new_tokens": 6, "stop_ids": tokenizer.stop_ids, "limit": tokenizer.vocab}
    wanted, bare = continued(model, adapted, ids, **how), continued(model, params, ids, **how)
    assert all(a != b for a, b in zip(wanted, bare, strict=True))
    texts = [f"--- prompt {i + 1}\n{tokenizer.decode([*before, *new])}\n" for i, (before, new) in enumerate(zip(ids, wanted, strict=True))]
    assert printed(capsys, hub, *prompts, "--max-new-tokens", 6, "--adapter", adapters / name) == "".join(texts)
    if name == "lora":
        assert printed(capsys, adapters / name, *prompts, "--max-new-tokens", 6, "--merge", True) == "".join(texts)


def test_prompts_may_be_read_in_both_directions(hub, capsys):
    tokenizer, (model, params) = interop.load_tokenizer(hub), interop.load(hub)
    ids = tokenizer.encode("the king and the queen")
    new, other = (
        generate(model, params, [ids], max_new_tokens=6, stop_ids=tokenizer.stop_ids, tokenizer=tokenizer, bidirectional=both)[0]
        for both in (True, False)
    )
    assert new != other
    said = printed(capsys, hub, "the king and the queen", "--max-new-tokens", 6, "--bidirectional", True)
    assert said == f"{tokenizer.decode([*ids, *new])}\n"


def test_an_adapter_whose_base_is_elsewhere_says_so(adapters, run, tmp_path):
    shutil.copytree(adapters / "lora", tmp_path / "lora")
    with pytest.raises(ValueError, match="is an adapter over base_model_name_or_path='hub0', which is no folder here; name the base's"):
        load_writer(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"is an adapter over a checkpoint, and .* is a run that began with none"):
        load_writer(run, adapter=adapters / "lora")
    with pytest.raises(ValueError, match="merge=True, and there is no adapter"):
        load_writer(run, merge=True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["RUN", "x", "--temprature", "1"], "--temprature is not a knob; did you mean --temperature? (--help lists all)"),
        (["RUN", "x", "--top-k", "many"], "--top-k=many is not an integer"),
        (["RUN", "x", "--cache", "int4"], "--cache=int4 is not one of float32, bfloat16, float16, int8 or None; did you mean int8?"),
        (["RUN"], "name a folder and at least one prompt, before any flag: python -m lmx.generate PATH"),
        (["RUN", ""], "there is no prompt, or an empty one"),
        (["RUN", "a\udcff"], "is no text at place 1"),
        (["RUNS/play", "x"], "did you mean RUNS/plays? (expected the folder of a run or of a Hugging Face checkpoint)"),
        (["RUNS", "x"], "RUNS is no run, which has experiment.json, and no Hugging Face checkpoint, which has config.json"),
        (["RUN", "x", "--chat"], "--chat needs the chat template of a Hugging Face checkpoint"),
        (["RUN", "x", "--n", "2"], "n=2 texts at temperature=0 would all be the same; raise --temperature"),
        (["RUN", "x", "--top-p", "0"], "top_p=0.0 must be above 0 and at most 1"),
        (["RUN", "x"], "a prompt of 1 tokens and max_new_tokens=128 are longer than the engine's longest=64"),
        (["RUN", "x", "--max-new-tokens", "4", "--stop", ""], "has an empty string, which ends every text before it begins"),
        (["RUN", "x", "--step", "5"], "has no checkpoint of step 5"),
        (["RUN", "x", "--tokenizer", "nowhere.json"], "nowhere.json' does not exist"),
        (["HUB", "x", "--step", "5"], "step=5 is of a run"),
    ],
)
def test_what_is_wrong_is_one_line(argv, message, run, hub, capsys):
    def there(text):
        return text.replace("RUNS", str(run.parent)).replace("RUN", str(run)).replace("HUB", str(hub))

    with pytest.raises(SystemExit) as stop:
        door.main([there(word) for word in argv])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert there(message) in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("config.json", b"{", "config.json should hold JSON: "),
        ("config.json", b"[]", "config.json should hold a JSON object, and holds a list"),
        ("config.json", b'{"model_type": ["llama"]}', "model_type=['llama'] is not one of"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "16"}', "config.json has a field of another kind than a llama's"),
        ("config.json", b'{"model_type": "llama", "num_attention_heads": 0}', "config.json has a field of another kind than a llama's"),
        ("model.safetensors.index.json", b"{oops", "model.safetensors.index.json should hold JSON: "),
        ("model.safetensors.index.json", b"{}", "model.safetensors.index.json has no weight_map"),
        ("model.safetensors", b"\x05" + 7 * b"\0" + b"abcde", "model.safetensors should hold JSON: "),
        ("model.safetensors", b"\x09" + 7 * b"\0" + b'{"a":"b"}', "model.safetensors is no safetensors file: of a it does not say"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named(name, data, message, hub, tmp_path, capsys):
    folder = shutil.copytree(hub, tmp_path / "broken")
    (folder / name).write_bytes(data)
    with pytest.raises(SystemExit) as stop:
        door.main([str(folder), "x"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_run_whose_tokenizer_changed_is_refused(run, tmp_path):
    write_run(
        tmp_path / "run", Experiment(name="run", data=Data(train="", tokenizer="bytes"), model=SMALL), 1, data={"tokenizer": "another"}
    )
    with pytest.raises(ValueError, match="was trained with another tokenizer than"):
        load_writer(tmp_path / "run")
    assert load_writer(tmp_path / "run", tokenizer="bytes").tokenizer.vocab == 257


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        door.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for flag in ("--max-new-tokens", "--repetition-penalty", "--cache", "--chat", "--stats"):
        assert flag in said


@pytest.fixture(scope="module")
def sees(root, tmp_path_factory):
    """A LLaVA that reads words, with the settings of a processor; and a folder of images."""
    folder, files = tmp_path_factory.mktemp("sees"), root / "tests" / "data_files"
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(files / "images" / "llava_mistral" / name, folder / name)
    shutil.copyfile(files / "prepared_images" / "llava.json", folder / "preprocessor_config.json")
    words = ["<pad>", "<s>", "</s>", "<unk>", "the", "<image>", *(f"w{i}" for i in range(34))]
    reads = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    reads.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    reads.add_special_tokens(["<image>"])
    reads.save(str(folder / "tokenizer.json"))
    return folder, files / "prepared_images"


def test_images_are_read_from_files(sees, capsys):
    folder, images = sees
    model, params = interop.load(folder)
    paths, shown = [str(images / "wide.png"), str(images / "gray.png")], 4 * [5]
    pixels = prepared(paths, read_preparation(folder))
    reads = interop.load_tokenizer(folder)

    def wanted(ids, seen):
        (new,) = generate(model, params, [ids], max_new_tokens=6, pixel_values=pixels[seen], stop_ids=reads.stop_ids)
        return reads.decode(new)

    def written(prompt, *files):
        return printed(capsys, folder, prompt, "--max-new-tokens", 6, "--image", *files).removeprefix(prompt).strip()

    texts = [written("the w3", paths[0]), written("the w3", paths[1]), written("the <image> w3 <image>", *paths)]
    assert texts[:2] == [wanted([*shown, 4, 9], [0]), wanted([*shown, 4, 9], [1])]
    assert texts[2] == wanted([4, *shown, 9, *shown], [0, 1])
    assert len(set(texts)) == 3


@pytest.mark.parametrize(
    ("prompt", "images", "words"),
    [
        ("the <image>", ["wide.png", "gray.png"], "has places for 1 images, and there are 2 of --image"),
        ("the", ["none.png"], "none.png does not exist"),
    ],
)
def test_images_that_have_no_place_are_refused(sees, prompt, images, words, capsys):
    folder, there = sees
    with pytest.raises(SystemExit):
        door.main([str(folder), prompt, "--image", *(str(there / name) for name in images)])
    assert words in capsys.readouterr().err


def test_a_model_that_reads_no_images_refuses_them(run, sees, capsys):
    with pytest.raises(SystemExit):
        door.main([str(run), "ROMEO.", "--image", str(sees[1] / "wide.png")])
    assert "for a Transformer, which reads none; leave it out" in capsys.readouterr().err
