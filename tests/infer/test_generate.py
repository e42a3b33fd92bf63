"""Continuations: the same from a run, from its export and by hand; options and refusals."""

from pathlib import Path

import pytest
import torch

from megnorm import cli
from megnorm.data import tokenizer as tokenizers
from megnorm.hf.convert import to_hf
from megnorm.hf.native import native_forward, write_native
from megnorm.infer.generate import Sampling, generate, load
from tests.hf.tiny import made

PROMPTS = [[5, 9, 31, 7], [12, 3], [40, 41, 42, 43, 44, 45]]


@pytest.fixture(params=["hybridnorm", "preln"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A run and its export; the second scheme leaves as a native class."""
    model, resolved, state = made(request.param)
    write_native(tmp_path / "run", model, resolved, state)
    to_hf(state, model, resolved, out=tmp_path / "hf")
    return tmp_path / "run", tmp_path / "hf"


@pytest.mark.parametrize("sampling", [Sampling(9, 0.0), Sampling(9, 0.8, 20, 0.9, seed=3, count=2)])
def test_a_run_and_its_export_say_the_same(places: tuple[Path, Path], sampling: Sampling) -> None:
    run, folder = (generate(load(place), PROMPTS, sampling) for place in places)
    assert run == folder
    assert len(run) == len(PROMPTS) * sampling.count
    assert all(len(row) == 9 for row in run)


def test_greedy_is_what_the_native_forward_prefers(tmp_path: Path) -> None:
    model, resolved, state = made("normformer", positions="sinusoidal", padding_id=1)
    state["head.weight"][1] = 0.0  # a padding token is no continuation
    path = write_native(tmp_path / "run", model, resolved, state)
    forward = native_forward(state, model, resolved)
    generator = load(path)
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(forward(torch.tensor([ids]))[0, -1].argmax()))
        assert generate(generator, [prompt], Sampling(6, 0.0)) == [ids[len(prompt) :]]


def test_the_seed_decides_and_the_global_one_is_left_alone(places: tuple[Path, Path]) -> None:
    generator = load(places[0])
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = generate(generator, PROMPTS, Sampling(12, 1.5, seed=1))
    assert torch.rand(1) == expected
    assert first == generate(generator, PROMPTS, Sampling(12, 1.5, seed=1))
    assert first != generate(generator, PROMPTS, Sampling(12, 1.5, seed=2))


def test_one_likely_token_is_greedy(places: tuple[Path, Path]) -> None:
    generator = load(places[1])
    greedy = generate(generator, PROMPTS, Sampling(8, 0.0))
    assert greedy == generate(generator, PROMPTS, Sampling(8, 1.3, top_k=1))
    assert greedy == generate(generator, PROMPTS, Sampling(8, 1.3, top_p=1e-6))


@pytest.mark.parametrize(
    ("prompts", "sampling", "message"),
    [
        ([], {}, "no prompt"),
        ([[]], {}, "prompt is empty"),
        ([[61]], {}, "token 61 is outside the vocabulary of 61"),
        ([[1] * 20], {"max_new_tokens": 40}, "60 positions and the model takes 48"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"temperature": 0.0, "count": 2}, "count must be 1"),
        ([[1]], {"max_new_tokens": 0}, "at least 1"),
    ],
)
def test_refusals_are_one_sentence(
    prompts: list[list[int]], sampling: dict[str, float], message: str, tmp_path: Path
) -> None:
    model, resolved, state = made("preln")
    write_native(tmp_path / "run", model, resolved, state)
    with pytest.raises(ValueError, match=message):
        generate(load(tmp_path / "run"), prompts, Sampling(**sampling))  # type: ignore[arg-type]


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizers.train(["the cat sat on the mat " * 9], tmp_path / "tokens", vocab_size=265)
    model, resolved, state = made("hybridnorm", vocab_size=280)
    write_native(tmp_path / "run", model, resolved, state, tokenizer=str(tmp_path / "tokens"))
    common = ["--max-new-tokens", "5", "--device", "cpu"]
    assert cli.main(["generate", str(tmp_path / "run"), "--prompt", "the cat", "--prompt", "mat", *common]) == 0
    said = capsys.readouterr().out
    assert said.startswith("the cat") and "\nmat" in said
    to_hf(state, model, resolved, out=tmp_path / "hf", tokenizer=tmp_path / "tokens")
    assert cli.main(["generate", str(tmp_path / "hf"), "--prompt", "the cat", "--prompt", "mat", *common]) == 0
    assert capsys.readouterr().out == said
    assert cli.main(["generate", str(tmp_path / "run"), "--tokens", "7", "8", "--greedy", *common]) == 0
    assert capsys.readouterr().out.startswith("7 8 ")
    assert cli.main(["generate", str(tmp_path / "nowhere"), "--prompt", "x"]) == 2
    assert "no checkpoint there" in capsys.readouterr().err


def test_nothing_from_the_folder_is_executed(tmp_path: Path) -> None:
    model, resolved, state = made("hybridnorm")
    to_hf(state, model, resolved, out=tmp_path / "hf")
    (tmp_path / "hf" / "modeling_megnorm.py").write_text("raise SystemExit('executed')\n")
    assert len(generate(load(tmp_path / "hf"), [[5]], Sampling(3))[0]) == 3
