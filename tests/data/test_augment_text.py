import copy
import pickle
import re
import sys
import types
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchref.data.augment import text as module
from torchref.data.augment.text import (
    OPTIONS,
    Continue,
    Seq2Seq,
    TextAugment,
    back_translation,
    delete_words,
    insert_synonyms,
    load_synonyms,
    replace_synonyms,
    swap_words,
)
from torchref.data.text import load_reviews

GREAT = {"good": ["great"], "bad": ["poor", "lousy"], "don't": ["never"], "été": ["saison"]}
FIXED = ["3", "2.5", "$9.99", "4K", "https://a.org/good?x=good", "me@good.com", "#good", "U.S."]
PIECES = [
    "good",
    "Bad",
    "GOOD",
    "don't",
    "well-known",
    "I",
    "NASA",
    "été",
    "हिन्दी",
    "слово",
    "word",
]
PUNCTUATION = st.sampled_from(["", ",", ".", "!", "...", ")", '"', " —"])
TEXTS = st.lists(
    st.tuples(
        st.sampled_from(["", " ", "\n", "(", '"']),
        st.sampled_from(PIECES + FIXED),
        PUNCTUATION,
        st.sampled_from([" ", "  ", "\n", "\t"]),
    ).map("".join),
    max_size=12,
).map("".join)
SHARES = st.floats(0, 1)
CHANGES = {
    "replace": lambda text, share, **kw: replace_synonyms(text, share, synonyms, **kw),
    "insert": lambda text, share, **kw: insert_synonyms(text, share, synonyms, **kw),
    "swap": swap_words,
    "delete": delete_words,
}


def synonyms(word):
    return GREAT.get(word, [])


def words(text):
    """An independent reading: what the pieces above can make."""
    kept = [chunk for chunk in text.split() if not re.search(r"\d|@|#|/|\w\.\w", chunk)]
    return [word for chunk in kept for word in re.split(r"[\s.,!()\"—]+", chunk) if word]


def rest(text):
    """What is left of a text without words and spaces: punctuation, numbers, addresses."""
    chunks = text.split()
    fixed = [
        c if re.search(r"\d|@|#|/|\w\.\w", c) else re.sub(r"[^.,!()\"—]", "", c) for c in chunks
    ]
    return "".join(fixed)


def lower(text):
    return Counter(word.lower() for word in words(text))


# What every change has in common.


@pytest.mark.parametrize("name", CHANGES)
@settings(deadline=None, max_examples=50)
@given(text=TEXTS, share=SHARES)
def test_punctuation_numbers_and_addresses_stay(name, text, share):
    assert rest(CHANGES[name](text, share)) == rest(text)


@pytest.mark.parametrize("name", CHANGES)
@settings(deadline=None, max_examples=50)
@given(text=TEXTS)
def test_a_share_of_0_is_the_identity(name, text):
    assert CHANGES[name](text, 0.0) == text


@pytest.mark.parametrize("name", CHANGES)
@settings(deadline=None, max_examples=50)
@given(text=TEXTS, share=SHARES)
def test_protected_words_stay_in_their_order(name, text, share):
    protected = {"GOOD", "don\u2019t", "i"}  # in another case and with another apostrophe
    keys = {"good", "don't", "i"}
    after = CHANGES[name](text, share, protected=protected)
    assert [w for w in words(after) if w.lower() in keys] == [
        w for w in words(text) if w.lower() in keys
    ]


@pytest.mark.parametrize("name", CHANGES)
def test_a_seed_repeats_a_draw_and_another_seed_does_not(name):
    text = "good bad good bad good bad good bad good bad"

    def drawn(seed):
        torch.manual_seed(seed)
        return [CHANGES[name](text, 0.5) for _ in range(5)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert len(set(drawn(0))) > 1  # and the draws after each other differ


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("text", ["", "  \n", "12 3.5 https://a.b/c", "?!"])
def test_a_text_without_words_stays(name, text):
    assert CHANGES[name](text, 1.0) == text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "don't Don\u2019t rock'n'roll 'tis dogs'",
            ["don't", "Don\u2019t", "rock'n'roll", "tis", "dogs"],
        ),
        ("well-known --x-- e-mail", ["well-known", "x", "e-mail"]),
        ("été cafe\u0301 हिन्दी में слово", ["été", "cafe\u0301", "हिन्दी", "में", "слово"]),
        ("3 3rd 2.5 ½ x² Ⅷ 1,000", []),
        ("http://a.b/c www.a.org a@b.org example.com/x U.S. @me #tag a_b R&B <br/> x=y", []),
        ("(good), “bad” — fine…", ["good", "bad", "fine"]),
        ("end. Next", ["end", "Next"]),
    ],
)
def test_what_is_a_word(text, found):
    assert [word[0] for word in module._words(text)] == found


def test_words_of_a_long_text_are_found_in_linear_time():
    for piece in ("a-", "_", "a.", "a'", "-", "a"):
        module._words(piece * 100_000)


# Replacement.


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("Good dog", "Great dog"),
        ("GOOD dog", "GREAT dog"),
        ("  good,\tgood\n(good)!", "  great,\tgreat\n(great)!"),
        ("Don\u2019t", "Never"),
        ("goods good-bye", "goods good-bye"),
    ],
)
def test_replacement(text, after):
    assert replace_synonyms(text, 1.0, synonyms) == after


def test_a_letter_that_is_a_word_is_no_acronym():
    assert replace_synonyms("A dog", 1.0, {"a": ["some"]}.get) == "Some dog"


def test_all_synonyms_occur():
    assert {replace_synonyms("bad", 1.0, synonyms) for _ in range(50)} == {"poor", "lousy"}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("number", [3, 10, 11])
def test_the_share_is_the_expected_share_of_words_touched(name, number):
    """Over 1000 texts; 5 standard deviations of a share of swaps, the widest, are below 0.06."""
    text = " ".join(f"g{'o' * i}d" for i in range(number))  # different, so that a swap shows
    changes = {
        "replace": lambda text: replace_synonyms(text, 0.3, lambda word: ["new"]),
        "insert": lambda text: insert_synonyms(text, 0.3, lambda word: ["new"]),
        "swap": lambda text: swap_words(text, 0.3),
        "delete": lambda text: delete_words(text, 0.3),
    }
    torch.manual_seed(0)
    touched = 0
    for _ in range(1000):
        after = changes[name](text).split()
        if name == "delete":
            touched += number - len(after)
        elif name == "insert":
            touched += len(after) - number
        else:
            touched += sum(a != b for a, b in zip(after, text.split(), strict=True))
    expected = 0.3 - 0.3**3 / 3 if (name, number) == ("delete", 3) else 0.3  # one of three stays
    assert abs(touched / 1000 / number - expected) < 0.06 / number**0.5


# Insertion.


@settings(deadline=None, max_examples=50)
@given(TEXTS)
def test_insertion_adds_a_synonym_for_each_word_that_has_one(text):
    after = insert_synonyms(text, 1.0, synonyms)
    added = lower(after) - lower(text)
    known = [word for word in words(text) if synonyms(word.lower())]
    assert added.total() == len(known)
    assert set(added) <= {s for word in known for s in synonyms(word.lower())}
    assert not lower(text) - lower(after)


def test_a_synonym_is_added_at_any_place():
    torch.manual_seed(0)
    found = {insert_synonyms("(good), dog.", 1.0, synonyms) for _ in range(100)}
    assert found == {"(great good), dog.", "(good), great dog.", "(good), dog great."}


# Swaps.


@settings(deadline=None, max_examples=50)
@given(TEXTS, SHARES)
def test_a_swap_keeps_the_words_and_the_spaces(text, share):
    after = swap_words(text, share)
    assert lower(after) == lower(text)
    assert re.findall(r"\s+", after) == re.findall(r"\s+", text)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 30))
def test_with_a_share_of_1_every_word_moves(number):
    before = [f"x{'y' * i}" for i in range(number)]
    after = swap_words(" ".join(before), 1.0).split()
    assert not any(a == b for a, b in zip(after, before, strict=True))


def test_the_course_s_example():
    torch.manual_seed(0)
    found = {swap_words("The dog barks", 1.0) for _ in range(50)}
    assert found == {"Barks the dog", "Dog barks the"}


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("I ran.", "ran I."),
        ("NASA works", "works NASA"),
        ("A dog", "Dog a"),
        ("I'm here", "here I'm"),
        ("one", "one"),
    ],
)
def test_capitals_when_two_words_swap(text, after):
    assert swap_words(text, 1.0) == after


# Deletion.


@settings(deadline=None, max_examples=50)
@given(TEXTS, SHARES)
def test_words_that_remain_are_in_their_order(text, share):
    after = iter(words(text))
    kept = words(delete_words(text, share))
    assert all(word in after for word in kept)
    assert bool(kept) == bool(words(text))


def test_one_word_of_all_remains_and_it_can_be_any():
    torch.manual_seed(0)
    assert {delete_words("a b, c.", 1.0) for _ in range(50)} == {"a,.", "b,.", ", c."}
    assert delete_words("good bad good", 1.0, protected=["bad"]) == "bad"


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("no dog here", "no here"),
        ("dog, no", ", no"),
        ("dog no", "no"),
        ("no  dog  no", "no   no"),
        ("no (dog here) no", "no (here) no"),
        ("no\ndog here no", "no\nhere no"),
    ],
)
def test_a_space_goes_with_a_word(text, after):
    assert delete_words(text, 1.0, protected=["no", "here"]) == after


# TextAugment.


@settings(deadline=None, max_examples=50)
@given(st.lists(TEXTS, max_size=5))
def test_nothing_set_is_the_identity(texts):
    y = object()
    before = torch.get_rng_state()
    after, labels = TextAugment()(texts, y)
    assert after == texts
    assert labels is y
    assert torch.equal(torch.get_rng_state(), before)  # and it draws nothing


@settings(deadline=None, max_examples=50)
@given(st.lists(TEXTS, max_size=5), *[SHARES] * 5)
def test_as_many_texts_come_back(texts, replace, insert, swap, delete, rewrite):
    augment = TextAugment(
        replace=replace,
        insert=insert,
        swap=swap,
        delete=delete,
        rewrite=rewrite,
        synonyms=synonyms,
        rewriter=lambda texts: [text + " more" for text in texts],
    )
    before = list(texts)
    after, _ = augment(texts, None)
    assert len(after) == len(texts)
    assert texts == before
    assert [bool(t.strip()) for t in after] == [bool(t.strip()) for t in texts]


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_does_its_own_change(name):
    text = "good bad good bad good bad"
    torch.manual_seed(0)
    expected = CHANGES[name](text, 0.5, protected=["x"])
    torch.manual_seed(0)
    augment = TextAugment(**{name: 0.5}, synonyms=synonyms, protected=["x"])
    assert augment([text], None)[0] == [expected]
    assert expected != text


@pytest.mark.parametrize("name", OPTIONS)
def test_protected_words_reach_each_change(name):
    augment = TextAugment(**{name: 1.0}, synonyms=synonyms, protected=["Good", "bad"])
    assert augment(["good bad GOOD"], None)[0] == ["good bad GOOD"]


def test_the_rewriter_gets_some_texts_as_one_list_before_words_change():
    calls = []

    def rewriter(texts):
        calls.append(texts)
        return [text + " bad" for text in texts]

    torch.manual_seed(0)
    augment = TextAugment(rewrite=0.3, rewriter=rewriter, replace=1.0, synonyms={"bad": ["x"]}.get)
    texts = [f"text {i}" for i in range(1000)] + ["", " "]
    after, _ = augment(texts, None)
    assert len(calls) == 1
    assert 230 < len(calls[0]) < 370
    assert [b for b, a in zip(texts, after, strict=True) if a.endswith(" x")] == calls[0]


def test_a_rewriter_is_not_called_for_nothing():
    def rewriter(texts):
        raise AssertionError

    augment = TextAugment(rewrite=1.0, rewriter=rewriter)
    assert augment(["", " \n"], None)[0] == ["", " \n"]
    assert TextAugment(rewriter=rewriter)(["a"], None)[0] == ["a"]


@pytest.mark.parametrize(
    "result", [[], ["a"], ["a", "b", "c"], ["a", ""], ["a", " "], ["a", 1], ("a", "b"), "ab", None]
)
def test_a_rewriter_that_returns_something_else_raises(result):
    augment = TextAugment(rewrite=1.0, rewriter=lambda texts: result)
    with pytest.raises(ValueError, match="TextAugment: expected 2 strings that are not blank from"):
        augment(["x", "y"], None)


def test_it_can_be_copied_to_other_processes():
    augment = TextAugment(replace=1.0)
    for again in (pickle.loads(pickle.dumps(augment)), copy.deepcopy(augment)):
        assert again(["The movie."], None)[0] == ["The film."]


@pytest.mark.parametrize("name", [*OPTIONS, "rewrite"])
@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_outside_0_to_1_raise(name, share):
    with pytest.raises(ValueError, match=rf"TextAugment: expected `{name}` in \[0, 1\], got"):
        TextAugment(**{name: share}, rewriter=list)
    if name in CHANGES:
        with pytest.raises(ValueError, match=r"expected `share` in \[0, 1\], got"):
            CHANGES[name]("text", share)


def test_arguments_that_make_no_sense_raise():
    with pytest.raises(ValueError, match=r"TextAugment: `rewrite` is 0.5: expected a `rewriter`"):
        TextAugment(rewrite=0.5)
    with pytest.raises(TypeError, match="TextAugment: expected `synonyms` as a function, got dict"):
        TextAugment(synonyms=GREAT)
    with pytest.raises(TypeError, match="TextAugment: expected `rewriter` as a function, got str"):
        TextAugment(rewrite=1.0, rewriter="gpt2")
    with pytest.raises(TypeError, match="expected `protected` as a list of words, got 'not'"):
        TextAugment(protected="not")
    with pytest.raises(TypeError, match="expected `texts` as a list of strings, got 'text'"):
        TextAugment()("text", None)
    with pytest.raises(TypeError, match="expected `texts` as a list of strings, got"):
        TextAugment()([b"text"], None)
    with pytest.raises(TypeError, match="replace_synonyms: expected `synonyms` as a function"):
        replace_synonyms("text", 1.0, GREAT)
    with pytest.raises(TypeError, match="swap_words: expected `text` as a string, got list"):
        swap_words(["text"], 1.0)


# Synonyms.


def sound(word):
    return (
        "vowel" if re.match(r"(?!uni|us[eu]|eu|one?\b)[aeiou]|hour|honest|heir", word) else "other"
    )


def test_bundled_groups_are_clean():
    """Each word in one group, of which all take the same article and none is a function word."""
    groups = {tuple(group) for group in module._bundled().values()}
    every = [word for group in groups for word in group]
    assert 150 <= len(groups) <= 300
    assert len(every) == len(set(every))
    assert all(len(group) > 1 and len({sound(word) for word in group}) == 1 for group in groups)
    assert all([w[0] for w in module._words(word)] == [word.lower()] for word in every)
    assert not set(every) & set(module.FUNCTION_WORDS.split())


def test_bundled_synonyms():
    found = load_synonyms("bundled")
    assert found("good") == ["fine", "great"]
    assert "good" in found("great")
    assert found("xyz") == found("Good") == []
    found("good").clear()
    assert found("good") == ["fine", "great"]


def test_bundled_synonyms_keep_the_sentiment_of_reviews():
    """A bag of words that is right before words are replaced is right after it, nearly always."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts, labels = load_reviews()
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10)).fit(
        texts[:160], labels[:160]
    )
    torch.manual_seed(0)
    after, _ = TextAugment(replace=1.0)(texts, labels)
    assert sum(a != b for a, b in zip(after, texts, strict=True)) > 150
    again = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10)).fit(
        texts[:160] + after[:160], labels[:160] * 2
    )
    assert again.score(after[160:], labels[160:]) >= model.score(texts[160:], labels[160:]) - 0.1


ADJ = """  1 a license, whose lines begin with spaces
00000100 00 a 03 good 0 great(p) 0 Kant 0 001 ! 00000000 a 0101 | of high quality
00000200 00 s 04 hot_dog 0 fine 1 good 2 well-made 0 000 | satisfactory
"""


@pytest.fixture
def wordnet(tmp_path, monkeypatch):
    """The smallest WordNet: two senses of `good`, one line for each of 500 other words."""
    lines = ADJ.splitlines(keepends=True)
    first, second = len(lines[0]), len(lines[0]) + len(lines[1])
    index = {"good": f"good a 2 1 ! 2 1 {first:08d} {second:08d}  \n"}
    index |= {f"w{i}": f"w{i} a 1 0 1 0 {second:08d}  \n" for i in range(500)}
    index |= {w: f"{w} a 1 0 1 0 {second:08d}  \n" for w in ("fine", "well-made", "été", "in")}
    for part in module.PARTS:
        (tmp_path / f"data.{part}").write_text(ADJ if part == "adj" else "  1 nothing\n")
        (tmp_path / f"index.{part}").write_text("  1 nothing\n")
    rows = sorted(index.values(), key=str.encode)
    (tmp_path / "index.adj").write_text("  1 license\n  2 more\n" + "".join(rows), "utf-8")
    monkeypatch.setattr(module, "WORDNET", tmp_path)
    return tmp_path, list(index)


def test_debian_files(wordnet):
    found = load_synonyms("debian")
    assert found("good") == ["fine", "great", "well-made"]  # no name, no phrase, no marker
    assert found("fine") == ["good", "well-made"]
    assert [found(w) for w in ("", " ", "goo", "goods", "a", "zzz", "w", "wordless")] == [[]] * 8
    assert found("in") == []
    found("good").clear()
    assert found("good") == ["fine", "great", "well-made"]


def test_every_line_of_an_index_is_found(wordnet):
    folder, names = wordnet
    index = module._mapped(folder / "index.adj")
    for name in names:
        assert module._line_of(index, name.encode())[0].decode() == name


def test_missing_sources_raise_and_the_default_takes_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WORDNET", tmp_path)
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)
    with pytest.raises(FileNotFoundError, match="apt install wordnet-base"):
        load_synonyms("debian")
    with pytest.raises(ImportError, match="pip install nltk"):
        load_synonyms("nltk")
    with pytest.raises(ValueError, match="expected nltk, debian, bundled, got 'wordnet'"):
        load_synonyms("wordnet")
    assert load_synonyms() is load_synonyms("bundled")


def nltk_with(monkeypatch, synsets):
    """NLTK with these synsets as its WordNet, or without its data."""

    class Corpus:
        def ensure_loaded(self):
            if synsets is None:
                raise LookupError

        def synsets(self, word):
            return [types.SimpleNamespace(lemma_names=lambda names=n: names) for n in synsets]

    nltk, corpus = types.ModuleType("nltk"), types.ModuleType("nltk.corpus")
    corpus.wordnet = Corpus()
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    monkeypatch.setitem(sys.modules, "nltk.corpus", corpus)


def test_nltk(monkeypatch, wordnet):
    nltk_with(monkeypatch, [["good", "great", "Kant", "hot_dog"], ["other"], ["fine", "good"]])
    assert load_synonyms("nltk")("good") == ["fine", "great"]  # a synset of another form is left
    assert load_synonyms() is load_synonyms("nltk")
    nltk_with(monkeypatch, None)
    with pytest.raises(FileNotFoundError, match="python -m nltk.downloader wordnet"):
        load_synonyms("nltk")
    assert load_synonyms() is load_synonyms("debian")


@pytest.mark.skipif(
    not (module.WORDNET / "index.noun").exists(), reason="waits for: apt install wordnet-base"
)
def test_the_whole_wordnet():
    found = load_synonyms("debian")
    assert {"well", "right"} <= set(found("good"))
    assert found("movie") == ["film", "flick", "pic", "picture"]
    assert "awaken" in found("awake")
    assert [found(w) for w in ("not", "in", "he", "dogs", "xyzzy")] == [[]] * 5
    names = (module.WORDNET / "index.adv").read_bytes().splitlines()[29:]
    index = module._mapped(module.WORDNET / "index.adv")
    for line in names[::50]:
        assert module._line_of(index, line.split()[0]) == line.split()


# Models.

VOCABULARY = ["<pad>", "</s>", "<unk>", "the", "dog", "barks", ".", "Paraphrase", ":", "cat"]
TEXTS_OF_DOGS = ["the dog barks .", "the cat", "dog dog dog dog dog dog"]


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, "<unk>")
    raw = tokenizers.Tokenizer(words)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,
    )


@pytest.fixture
def t5(tokenizer):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(VOCABULARY),
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


@pytest.fixture
def gpt2(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_positions=64,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


@pytest.fixture
def make(request, tokenizer):
    model = request.getfixturevalue(request.param)
    cls = {"t5": Seq2Seq, "gpt2": Continue}[request.param]
    return lambda **generate: cls(model, tokenizer, **generate)


BOTH = pytest.mark.parametrize("make", ["t5", "gpt2"], indirect=True)


@BOTH
def test_a_model_writes_a_text_for_each(make):
    rewriter = make(max_new_tokens=5, min_new_tokens=5, do_sample=True)
    torch.manual_seed(0)
    after = rewriter(TEXTS_OF_DOGS)
    assert len(after) == 3
    assert all(text and set(text.split()) <= set(VOCABULARY) for text in after)
    assert not any("<pad>" in text or "</s>" in text for text in after)
    assert len(set(after)) > 1
    torch.manual_seed(0)
    assert rewriter(TEXTS_OF_DOGS) == after
    torch.manual_seed(1)
    assert rewriter(TEXTS_OF_DOGS) != after
    assert rewriter([]) == []
    assert not any(p.grad_fn for p in rewriter.model.parameters())
    assert not rewriter.model.training  # dropout would change what it writes


@BOTH
def test_padding_changes_nothing(make):
    rewriter = make(max_new_tokens=4, min_new_tokens=4, num_beams=2)
    together = rewriter(TEXTS_OF_DOGS)
    assert together == [rewriter([text])[0] for text in TEXTS_OF_DOGS]


@BOTH
def test_where_nothing_is_written_the_text_stays(make):
    rewriter = make(max_new_tokens=3, suppress_tokens=list(range(2, len(VOCABULARY))))
    assert rewriter(TEXTS_OF_DOGS) == TEXTS_OF_DOGS


@BOTH
def test_a_model_in_text_augment(make):
    augment = TextAugment(rewrite=1.0, rewriter=make(max_new_tokens=3, do_sample=True))
    after, y = augment(TEXTS_OF_DOGS, [0, 1, 0])
    assert len(after) == 3
    assert all(after)
    assert y == [0, 1, 0]


@BOTH
def test_more_than_one_text_for_each_raises(make):
    with pytest.raises(ValueError, match="got `num_return_sequences` 2"):
        make(num_return_sequences=2)


def test_the_prefix_and_the_prompt_are_read(t5, gpt2, tokenizer, monkeypatch):
    seen = []

    def encoded(model, tokenizer, texts, side):
        seen.append((texts, side))
        return real(model, tokenizer, texts, side)

    real = module._encoded
    monkeypatch.setattr(module, "_encoded", encoded)
    Seq2Seq(t5, tokenizer, prefix="dog : ", max_new_tokens=2)(["the {text}"])
    Continue(gpt2, tokenizer, prompt="{text} {} :", max_new_tokens=2)(["a {b} {text}"])
    assert seen == [(["dog : the {text}"], "right"), (["a {b} {text} {} :"], "left")]


def test_only_what_follows_the_prompt_is_returned(gpt2, tokenizer):
    rewriter = Continue(gpt2, tokenizer, prompt="cat cat {text} cat", max_new_tokens=2)
    assert all(len(text.split()) <= 2 for text in rewriter(["barks barks barks barks"]))


def test_prompts_and_tokenizers_that_make_no_sense_raise(gpt2, tokenizer):
    with pytest.raises(ValueError, match="Continue: expected {text} in `prompt`, got 'a'"):
        Continue(gpt2, tokenizer, prompt="a")
    without = copy.deepcopy(tokenizer)
    without.pad_token = None
    with pytest.raises(ValueError, match="tokenizer.pad_token = tokenizer.eos_token"):
        Continue(gpt2, without)


def test_back_translation_goes_there_first():
    rewriter = back_translation(
        lambda texts: [t + " there" for t in texts], lambda texts: [t + " back" for t in texts]
    )
    assert rewriter(["a", "b"]) == ["a there back", "b there back"]


def test_back_translation_with_models(t5, tokenizer):
    there = Seq2Seq(t5, tokenizer, max_new_tokens=3, do_sample=True)
    back = Seq2Seq(t5, tokenizer, prefix="dog ", max_new_tokens=3, do_sample=True)
    assert len(back_translation(there, back)(TEXTS_OF_DOGS)) == 3
