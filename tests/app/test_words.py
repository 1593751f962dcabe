"""Free text on the command line: as it is meant, or one line that says how to write it."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from nbmix.app.words import hydra_text, readable
from nbmix.errors import InputError

STRANGE = (
    *("epoch=3.h5ad", "~x.h5ad", "sample (1).h5ad", "a,b.h5ad", "a#b.h5ad", "a&b", "it's", '"q" a', "a!"),
    *(
        "Müller.h5ad",
        "数据.h5ad",
        "γδ T",
        "[a].h5ad",
        "{a}",
        "f(x)",
        "choice(1)",
        "a;b",
        "back\\",
        "1",
        "1e5",
        "yes",
    ),
)


def value(word: str):
    return OverridesParser.create().parse_override(word).value()


@pytest.mark.parametrize("text", STRANGE)
@pytest.mark.parametrize("key", ["data.path", "data.label_key", "+data.layer", "ckpt_path", "hydra.run.dir"])
def test_a_text_is_taken_as_it_is(key, text):
    (word,) = readable([f"{key}={text}"])
    assert word.startswith(f"{key}=")
    assert value(word) == text
    assert readable([word]) == [word]  # processes are started with the same words once more


@pytest.mark.parametrize("text", STRANGE)
def test_a_text_for_hydra(text):
    assert value(f"x={hydra_text(text)}") == text


@pytest.mark.parametrize(
    "word",
    [
        *(
            "data=h5ad",
            "model.n_components=3",
            "data.path='a b'",
            "data.path=null",
            "data.path=",
            "data.path=a.h5",
        ),
        *(
            "data.populations=[a,b c]",
            "m_step@model.m_step=newton",
            "~callbacks.scores",
            "+a.b={c: 1}",
            "--help",
        ),
        *("search.space=['start=choice(a,b)']", "hydra.run.dir=out/${model.n_components}"),
    ],
)
def test_what_hydra_reads_stays(word):
    assert readable([word]) == [word]


def test_sweeps_stay():
    for how in ("-m", "--multirun", "hydra.mode=MULTIRUN", "sweep=components"):
        words = [how, "model.n_components=2,3", "data.path=a.h5ad,b.h5ad", "seed=range(3)"]
        assert readable(words) == words


def test_lists_of_labels():
    (word,) = readable(["data.populations=[γδ T,'B cell', NK (CD56)]"])
    assert value(word) == ["γδ T", "B cell", "NK (CD56)"]
    (word,) = readable(["data.populations=CD4-positive, alpha-beta T cell"])
    assert value(word) == "CD4-positive, alpha-beta T cell"


def test_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["data.path=~/a (1).h5ad", "hydra.run.dir=~/out", "data.label_key=~/a"]
    assert [value(word) for word in readable(words)] == ["/home/me/a (1).h5ad", "/home/me/out", "~/a"]


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["model.n_components=3,4"],
            "=3,4: several values are a sweep, which needs -m; as one text",
        ),
        (["evaluation.scores=a(b"], "evaluation.scores=a(b: cannot be read; as one text it is"),
        (["-m", "data.path=a (1),b (2)"], """as texts it is 'data.path="a (1)","b (2)"'"""),
        (["data.path=M\udcfcller"], "has letters that the locale does not; set PYTHONUTF8=1"),
    ],
)
def test_what_can_be_meant_in_more_ways_is_said_in_one_line(words, message):
    with pytest.raises(InputError) as refused:
        readable(words)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
