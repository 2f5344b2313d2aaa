"""Files in the columns of CMCL 2021, and planted numbers that are named as such."""

import pytest
import torch
from support.loaded import folded_model
from support.probing import SITE, sentences

import lnfree_interp as lf
from lnfree_interp.errors import DataError

HEADER = "sentence_id,word_id,word,nFix,FFD,GPT,TRT,fixProp\n"


def row(sentence, word, text, numbers="15.1,3.2,4,5e0,100"):
    return f"{sentence},{word},{text},{numbers}\n"


GOOD = (
    HEADER
    + row(7, 0, "NA")
    + row(7, 1, '"one, ""two"""')
    + row(7, 2, "null.<EOS>")
    + row(9, 0, "10\u00a0km", "1,2,3,4,5")
)


def test_a_file_is_read_word_by_word(tmp_path):
    file = tmp_path / "cmcl.csv"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text(GOOD, encoding=encoding)
        data = lf.read_reading_times(file)
        assert [one.words for one in data.words] == [
            ("NA", 'one, "two"', "null."), ("10\u00a0km",),
        ]  # fmt: skip
        assert list(data.targets) == ["nFix", "FFD", "GPT", "TRT", "fixProp"]
        assert data.targets["nFix"].tolist() == [15.1, 15.1, 15.1, 1.0]
        assert data.targets["TRT"].tolist() == [5.0, 5.0, 5.0, 4.0]
        assert "2 sentences, 4 words, nFix, FFD, GPT, TRT, fixProp; from cmcl.csv" in repr(data)
    some = lf.read_reading_times(file, targets=["TRT"])
    assert list(some.targets) == ["TRT"]


BAD = {
    "columns": (HEADER.replace(",FFD", "").replace("TRT", "trt"), "lacks the columns FFD, TRT"),
    "one column": (HEADER.replace("word_id,", ""), "lacks the column word_id: it has sentence_id"),
    "empty": ("", "it has none"),
    "no rows": (HEADER, "no sentences"),
    "text": (HEADER + row(0, 0, "a") + row(0, 1, "b", "1,2,x,4,5"), "line 3: GPT is 'x'"),
    "nan": (HEADER + row(0, 0, "a", "1,2,3,nan,5"), "line 2: TRT is 'nan'"),
    "blank": (HEADER + row(0, 0, "a", "1,,3,4,5"), "line 2: FFD is ''"),
    "id": (HEADER + row("ZuCo1-25", 0, "a"), "line 2: sentence_id is 'ZuCo1-25'"),
    "word": (HEADER + row(0, 0, ""), "line 2: the word is empty"),
    "gap": (HEADER + row(0, 0, "a") + row(0, 2, "b"), "line 3: word 2 of sentence 0 follows"),
    "twice": (HEADER + row(0, 0, "a") + row(0, 0, "b"), "line 3: word 0 of sentence 0 follows"),
    "back": (HEADER + row(1, 0, "a") + row(0, 0, "b"), "line 3: word 0 of sentence 0 follows"),
    "short": (HEADER + "0,0,a,1,2\n", "line 2: the row has more or fewer cells"),
    "long": (HEADER + row(0, 0, "a,b"), "line 2: the row has more or fewer cells"),
    "quotes": (HEADER + row(0, 0, '"a"b'), "cannot be read as a CSV file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_with_its_line(tmp_path, name):
    text, said = BAD[name]
    file = tmp_path / "bad.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        lf.read_reading_times(file)


def test_what_is_no_text_is_refused(tmp_path):
    file = tmp_path / "bad.csv"
    file.write_bytes(HEADER.encode() + b"0,0,caf\xe9,1,2,3,4,5\n")
    with pytest.raises(DataError, match="UTF-8"):
        lf.read_reading_times(file)
    with pytest.raises(DataError, match="cannot be read"):
        lf.read_reading_times(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match="give a list of columns"):
        lf.read_reading_times(file, targets=[])


def test_planted_numbers_say_so_and_go_through_a_file(tmp_path):
    model = folded_model("gpt2", tokenizer=True)
    data = lf.planted_reading_times(model, SITE, words=sentences(6), noise=0.5)
    assert all(name.startswith("planted_") for name in data.targets)
    assert data.source == f"planted in {SITE}: no measurements"
    assert "no measurements" in repr(data)
    file = tmp_path / "planted.csv"
    data.to_frame().to_csv(file, index=False)
    again = lf.read_reading_times(file, targets=list(data.targets))
    assert again.words == data.words
    for name, column in data.targets.items():
        assert torch.equal(again.targets[name], column)
    other = lf.planted_reading_times(model, SITE, words=sentences(6), noise=0.5, seed=1)
    assert not torch.equal(other.targets["planted_TRT"], data.targets["planted_TRT"])
    for bad in ({"sentences": 0}, {"noise": -1.0}, {"pool": "max"}):
        with pytest.raises(DataError):
            lf.planted_reading_times(model, SITE, **bad)


def test_noise_is_as_much_as_was_asked_for():
    model = folded_model("gpt2", tokenizer=True)
    more = {"words": sentences(200), "seed": 3}
    clean = lf.planted_reading_times(model, SITE, **more)
    for column in clean.targets.values():
        assert column.mean().item() == pytest.approx(20)
        assert column.std(correction=0).item() == pytest.approx(5)
    noisy = lf.planted_reading_times(model, SITE, **more, noise=1.0)
    spread = [column.std().item() for column in noisy.targets.values()]
    assert sum(spread) / len(spread) == pytest.approx(5 * 2**0.5, rel=0.05)
