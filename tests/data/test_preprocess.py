"""Text to tokens: bad lines, compressed files, units, resuming, many ranks, the command line."""

import argparse
import bz2
import gzip
import json
import lzma
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from megnorm.data import commands, pieces, preprocess
from megnorm.data.documents import Lines, Unit, plan_units
from megnorm.data.errors import DataError
from megnorm.data.indexed import IndexedDataset
from megnorm.data.pieces import Pieces
from megnorm.data.preprocess import Job, run
from megnorm.data.sidecar import read_sidecar, verify
from megnorm.data.tokenizer import HuggingFace as Tokenizer
from megnorm.data.tokenizer import load, train
from tests.data.helpers import GOOD, TEXTS, files, job, texts_of

BAD = {
    "malformed JSON": (b'{"text": "a', "not JSON"),
    "missing key": (b'{"other": "a"}', "no key 'text'"),
    "null as text": (b'{"text": null}', "null, not a string"),
    "number as text": (b'{"text": 3}', "number, not a string"),
    "bad UTF-8": (b'{"text": "\xff"}', "not UTF-8 at byte 11"),
    "lone surrogate": (b'{"text": "a\\ud800"}', "lone surrogate"),
    "empty line": (b"", "empty line"),
    "byte order mark": (b'\xef\xbb\xbf{"text": "a"}', "byte order mark"),
    "top-level list": (b'["text"]', "a JSON list"),
    "deep nesting": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    "long line": (b'{"text": "' + b"y" * 5000 + b'"}', "longer than"),
    "white space": (b'{"text": " \\n\\t "}', "white space"),
    "NUL bytes": (b'{"text": "a\x00b"}', "NUL"),
    "NUL escaped": (b'{"text": "a\\u0000b"}', "NUL"),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD)
    return path


def test_documents_come_out_in_order(source: Path, tmp_path: Path) -> None:
    report = run(job(source, tmp_path / "out"))
    assert texts_of(tmp_path / "out") == TEXTS
    data = IndexedDataset(tmp_path / "out")
    assert (report.documents, report.empty, report.tokens) == (6, 1, data.total)
    assert len(data) == 5 and data.document_count == 6
    assert all(data[i][-1] == 256 for i in range(5))
    record = read_sidecar(str(tmp_path / "out"))
    assert record["eod"] == 256 and record["max_id"] == 256 and record["tokens"] == data.total
    assert verify(str(tmp_path / "out")) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.bin", "out.idx", "out.meta.json"]


@pytest.mark.parametrize("kind", sorted(BAD))
def test_bad_lines_are_skipped_and_told(tmp_path: Path, kind: str) -> None:
    line, reason = BAD[kind]
    source, lines = tmp_path / "in.jsonl", GOOD.splitlines(keepends=True)
    source.write_bytes(b"".join([*lines[:3], line + b"\n", *lines[3:]]))
    limit = 4000 if kind == "long line" else 1 << 20
    for unit_bytes in (1 << 20, max(50, len(line) // 2)):
        report = run(job(source, tmp_path / "out", max_line_bytes=limit, unit_bytes=unit_bytes))
        assert report.bad == 1 and report.documents == 6
        assert report.first[0].startswith(f"{source}:4: ") and reason in report.first[0]
        assert texts_of(tmp_path / "out") == TEXTS
        for suffix in (".bin", ".idx", ".meta.json"):
            Path(f"{tmp_path}/out{suffix}").unlink()
        with pytest.raises(DataError, match=":4: ") as caught:
            run(job(source, tmp_path / "out", max_line_bytes=limit, unit_bytes=unit_bytes, strict=True))
        assert reason in str(caught.value)
        assert not (tmp_path / "out.bin").exists()
        shutil.rmtree(tmp_path / "out.parts", ignore_errors=True)


@pytest.mark.full
def test_a_line_of_100_megabytes(tmp_path: Path) -> None:
    """With the limit as it is, not held in memory, and the lines after it are read."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD + b'{"text": "' + b"y" * 100_000_000 + b'"}\n' + GOOD)
    report = run(Job(inputs=(str(source),), output=str(tmp_path / "out"), tokenizer="bytes", progress=False))
    assert (report.documents, report.bad) == (12, 1)
    assert report.first == [f"{source}:7: the line is longer than --max-line-bytes"]
    assert texts_of(tmp_path / "out") == TEXTS * 2


def test_only_five_are_told(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD + b"{\n" * 20)
    report = run(job(source, tmp_path / "out", unit_bytes=64))
    assert report.bad == 20
    assert [line.split(":")[1] for line in report.first] == ["7", "8", "9", "10", "11"]
    with pytest.raises(DataError, match="no document with text in it"):
        source.write_bytes(b"{}\n")
        run(job(source, tmp_path / "out"))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files(source: Path, tmp_path: Path, suffix: str) -> None:
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}[suffix]
    run(job(source, tmp_path / "plain"))
    path = tmp_path / f"in.jsonl{suffix}"
    path.write_bytes(pack(GOOD[:100]) + pack(GOOD[100:]))  # two members, as made by appending
    run(job(path, tmp_path / "out"))
    assert files(tmp_path / "out") == files(tmp_path / "plain")
    path.write_bytes(pack(GOOD)[:-20])
    with pytest.raises(DataError, match="cannot be read beyond line"):
        run(job(path, tmp_path / "torn"))
    assert not list(tmp_path.glob("torn*"))


def test_parquet(tmp_path: Path, source: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table({"text": [*TEXTS, None, "  "], "n": list(range(8))}), tmp_path / "in.parquet")
    run(job(source, tmp_path / "plain"))
    report = run(job(tmp_path / "in.parquet", tmp_path / "out"))
    assert files(tmp_path / "out") == files(tmp_path / "plain") and report.bad == 2
    assert "in.parquet:7: 'text' is null" in report.first[0]
    with pytest.raises(DataError, match="no column 'other'"):
        run(job(tmp_path / "in.parquet", tmp_path / "x", keys=("other",)))
    (tmp_path / "in.parquet").write_bytes((tmp_path / "in.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match="not a sound Parquet file"):
        run(job(tmp_path / "in.parquet", tmp_path / "x"))


def test_sentencepiece(shared: Path) -> None:
    pytest.importorskip("sentencepiece")
    words = load(str(shared / "data/tokenizers/spm8k-multi"))
    ids, lengths = words.encode_batch(["hello world", "", "Guten Tag"])
    assert words.vocab_size == 8192 and words.eod == 2 and lengths[1] == 0
    assert words.decode(ids[: lengths[0]].tolist()) == "hello world"
    assert words.token_id("</s>") == 2 and words.token_id("<none>") is None


def test_tiktoken(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)}
    small = tiktoken.Encoding("small", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(tiktoken, "get_encoding", {"small": small}.__getitem__)
    run(job(source, tmp_path / "plain"))
    run(job(source, tmp_path / "out", tokenizer="tiktoken:small"))
    assert files(tmp_path / "out") == files(tmp_path / "plain")
    words = load("tiktoken:small")
    assert (words.eod, words.token_id("<|endoftext|>"), words.token_id("a")) == (256, 256, None)


@settings(max_examples=50)
@given(
    lines=st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=12), unit=st.integers(1, 40)
)
def test_every_line_lies_in_one_unit(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], unit: int) -> None:
    path = tmp_path_factory.mktemp("x") / "in.jsonl"
    for end in (b"\n", b""):
        path.write_bytes(b"\n".join(lines) + (end if lines else b""))
        found = [line for one in plan_units([str(path)], unit) for _, line in Lines(one, 100)]
        assert found == path.read_bytes().splitlines(keepends=True) or b"\r" in path.read_bytes()
        assert b"".join(found) == path.read_bytes()


def test_long_lines_across_units(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"a\n" + b"b" * 100 + b"\nc\n")
    units = plan_units([str(path)], 10)
    assert [line for unit in units for _, line in Lines(unit, 20)] == [b"a\n", None, b"c\n"]
    assert [line for _, line in Lines(Unit(str(path), 0, 105), 200)] == [b"a\n", b"b" * 100 + b"\n", b"c\n"]


def test_units_and_globs_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    lines = GOOD.splitlines(keepends=True)
    for i in range(3):
        (tmp_path / f"part{i}.jsonl").write_bytes(b"".join(lines[2 * i : 2 * i + 2]))
    run(job(source, tmp_path / "one"))
    run(job(source, tmp_path / "many", unit_bytes=7))
    run(job(tmp_path / "part*.jsonl", tmp_path / "glob"))
    assert files(tmp_path / "one") == files(tmp_path / "many") == files(tmp_path / "glob")
    with pytest.raises(DataError, match="no such file"):
        run(job(tmp_path / "nothing*", tmp_path / "x"))


def test_an_interrupted_run_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(job(source, tmp_path / "whole", unit_bytes=60))
    calls, real = [], preprocess.encode_unit

    def dies(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(preprocess, "encode_unit", dies)
    with pytest.raises(KeyboardInterrupt):
        run(job(source, tmp_path / "out", unit_bytes=60))
    assert not list(tmp_path.glob("out.bin")) and (tmp_path / "out.parts").is_dir()
    monkeypatch.setattr(preprocess, "encode_unit", real)
    report = run(job(source, tmp_path / "out", unit_bytes=60))
    assert report.resumed == 3 and report.documents == 6
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not (tmp_path / "out.parts").exists()


def test_parts_of_another_job_are_not_used(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = preprocess._join
    monkeypatch.setattr(preprocess, "_join", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(job(source, tmp_path / "out"))
    monkeypatch.setattr(preprocess, "_join", real)
    report = run(job(source, tmp_path / "out", append_eod=False))
    assert report.resumed == 0 and 256 not in IndexedDataset(tmp_path / "out").tokens


def test_keys_sentences_and_names(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"a": "One. Two! 3?", "b": "x"}\n{"a": "", "b": "y"}\n')
    run(job(source, tmp_path / "out", keys=("a", "b"), sentences=True, names="megatron"))
    a, b = (IndexedDataset(tmp_path / f"out_{key}_sentence") for key in "ab")
    assert [bytes(s[s < 256].astype(np.uint8)) for s in a.document(0)] == [b"One.", b"Two!", b"3?"]
    assert [int(s[-1]) == 256 for s in a.document(0)] == [False, False, True]
    assert a.document(1) == [] and b.document_count == 2


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(dest="verb")
    for name, (_, add, main) in commands.VERBS.items():
        sub = verbs.add_parser(name)
        add(sub)
        sub.set_defaults(main=main)
    return parser.parse_args(words)


def call(*words: object) -> int:
    args = arguments(*map(str, words))
    return args.main(args)


def test_the_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tok, out = tmp_path / "tok", tmp_path / "out"
    assert call("tokenizer", "train", "--input", source, "--output", tok, "--vocab-size", 300) == 0
    assert call("preprocess", "--input", source, "--output", out, "--tokenizer", tok, "--quiet") == 0
    assert "6 documents (1 empty)" in capsys.readouterr().out
    assert call("data", "verify", out) == 0
    assert call("data", "inspect", out, "--tokenizer", tok, "--documents", 6) == 0
    shown = capsys.readouterr().out
    assert "one two<|endoftext|>" in shown and "6 documents, 5 sequences" in shown
    assert call("data", "merge", out, out, "--output", tmp_path / "two") == 0
    assert call("data", "split", tmp_path / "two", "--output", tmp_path / "cut", "--fractions", 1, 1) == 0
    assert files(tmp_path / "cut_0") == files(out) == files(tmp_path / "cut_1")
    index = ["--cache", tmp_path / "cache", "--sequence-length", 8, "--seed", 1, "--split", 1, 0, 0]
    assert call("data", "index", out, *index) == 0
    assert [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    Path(f"{out}.meta.json").unlink()
    with pytest.raises(DataError, match="no checksums"):
        call("data", "verify", out)
    assert call("data", "verify", out, "--write") == 0
    assert call("data", "verify", out) == 0
    with pytest.raises(DataError, match="no tokenizer there"):
        call("preprocess", "--input", source, "--output", out, "--tokenizer", tmp_path / "none")


def test_a_tokenizer_of_two_languages(tmp_path: Path) -> None:
    """Words of both columns are in it."""
    (tmp_path / "x.tsv").write_text("house door\tHaus\n" * 9, encoding="utf-8")
    words = ["tokenizer", "train", "--input", tmp_path / "x.tsv", "--vocab-size", 280, "--output"]
    assert call(*words, tmp_path / "two", "--keys", 0, 1) == 0 and call(*words, tmp_path / "one", "--keys", 0) == 0
    sizes = {name: load(str(tmp_path / name)).encode_batch(["Haus", "house"])[1].tolist() for name in ("one", "two")}
    assert sizes == {"one": [4, 1], "two": [1, 1]}


def test_a_trained_tokenizer_loads_in_transformers(tmp_path: Path) -> None:
    auto = pytest.importorskip("transformers").AutoTokenizer
    with pytest.raises(DataError, match="at least 258"):
        train(TEXTS, tmp_path / "tok", vocab_size=100)
    size = train(TEXTS * 9, tmp_path / "tok", vocab_size=300)
    theirs, ours = auto.from_pretrained(tmp_path / "tok"), load(str(tmp_path / "tok"))
    text = "one zwei \u4e09 drei"
    ids = ours.encode_batch([text])[0].tolist()
    assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == ours.decode(ids) == text
    assert len(theirs) == size == ours.vocab_size and theirs.eos_token_id == ours.eod == 0 and theirs.pad_token_id == 1


def test_known_ids(shared: Path) -> None:
    golden = json.loads((shared / "data/tokenizers/golden.json").read_text())
    gpt2 = load(str(shared / "data/tokenizers/gpt2"))
    assert gpt2.eod is None or gpt2.eod == 50256
    assert gpt2.pieces is not None
    tokens, lengths = gpt2.encode_batch([entry["text"] for entry in golden])
    assert tokens.tolist() == [number for entry in golden for number in entry["gpt2"]]
    assert lengths.tolist() == [len(entry["gpt2"]) for entry in golden]
    assert gpt2.encode_batch(["Hello world", "", "Hello"])[0].tolist() == [15496, 995, 15496]


BLANKS = " \n\t\r\x0b\x0c\x1c\x85\xa0\u2003\u2028\u200b\u3000"
SHREDS = [
    "a",
    "Don't",
    "we'll",
    "'S",
    "12",
    "!?",
    "\u00e9",
    "\u00b2",
    "\u4e09",
    "\x00",
    "\x1b",
    "y" * 40,
    "  ",
    "   ",
    " \n",
]


@pytest.fixture(scope="session")
def joiner() -> Tokenizer:
    """Merges any two neighbouring bytes, so that no cut in a wrong place goes unseen."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(one, two) for one in signs for two in signs]
    vocab = {word: number for number, word in enumerate(signs + [one + two for one, two in merges])}
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens(["<|endoftext|>"])
    found = Tokenizer(inner)
    assert found.pieces is not None
    return found


@settings(max_examples=300)
@given(
    texts=st.lists(
        st.lists(st.sampled_from([*SHREDS, "<|endoftext|>", *BLANKS]), max_size=12).map("".join), max_size=4
    ),
    entries=st.sampled_from([1, 1 << 20]),
    longest=st.sampled_from([2, 64]),
)
def test_pieces_encode_as_the_library_does(joiner: Tokenizer, texts: list[str], entries: int, longest: int) -> None:
    """Whatever the blanks, in tables that are full or not: the table of pieces and the library give the same ids."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(pieces, "ENTRIES", entries)
        context.setattr(pieces, "LONGEST", longest)
        tokens, lengths = joiner.encode_batch(texts)
    wanted = [joiner.inner.encode(text, add_special_tokens=False).ids for text in texts]
    assert tokens.tolist() == [number for ids in wanted for number in ids]
    assert lengths.tolist() == [len(ids) for ids in wanted]


def test_pieces_take_every_blank_for_what_it_is(joiner: Tokenizer) -> None:
    """All characters that may be blank to somebody, and all of ASCII, where they meet blanks and words."""
    odd = [c for c in map(chr, range(0x10000)) if unicodedata.category(c)[0] in "ZC" and not 0xD800 <= ord(c) < 0xF900]
    texts = [f"a{c} {c}b {c} c\n {c}{c}1" for c in {*odd, *map(chr, range(128))}]
    assert joiner.encode_batch(texts)[0].tolist() == [
        number for item in joiner.inner.encode_batch(texts, add_special_tokens=False) for number in item.ids
    ]


def test_pieces_of_known_words_ask_nobody(joiner: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was learned is looked up: neither the library nor the model is asked again, also for words in new company."""
    known = Pieces(joiner.inner)
    texts = ["one (two) caf\u00e9\n  three", "one) (two caf\u00e9\n  three"]
    ids = [known.encode_batch([text])[0].tolist() for text in (texts[0], texts[0])]
    wanted = [joiner.inner.encode(text, add_special_tokens=False).ids for text in texts]
    monkeypatch.setattr(known.table, "inner", None)
    monkeypatch.setattr(known.table.words, "model", None)
    assert ids == wanted[:1] * 2 and known.encode_batch(texts)[0].tolist() == wanted[0] + wanted[1]
