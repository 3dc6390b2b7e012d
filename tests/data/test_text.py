import copy
import io
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from torch.utils.data import DataLoader

from torchref.data.text import BagOfWords, load_reviews

TEXTS = st.lists(
    st.one_of(
        st.lists(
            st.sampled_from(["a", "ab", "Ab", "ÄB", "don't", "x1", "_x", "12", "straße", "слово"])
        ).map(" ".join),
        st.text(max_size=30),
    ),
    min_size=1,
    max_size=12,
)
FILMS = ["good film", "bad film", "bad bad acting"]


def theirs_on(texts, vocabulary=None, features=None):
    theirs = TfidfVectorizer(vocabulary=vocabulary, max_features=features)
    try:
        return theirs.fit(texts)
    except ValueError:  # no word in any text
        assume(False)
        raise


@settings(deadline=None, max_examples=50)
@given(TEXTS, TEXTS)
def test_equals_scikit_learn(train, test):
    theirs = theirs_on(train)
    ours = BagOfWords().fit(train)
    assert ours.terms == list(theirs.get_feature_names_out())
    x = ours(train + test).cpu()
    assert x.dtype == torch.float32
    expected = torch.from_numpy(theirs.transform(train + test).toarray()).float()
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(TEXTS, st.integers(1, 8))
def test_equals_scikit_learn_with_the_most_frequent_terms(train, features):
    everything = theirs_on(train)
    ours = BagOfWords(features).fit(train)
    counts = TfidfVectorizer(use_idf=False, norm=None).fit_transform(train).sum(0).tolist()[0]
    frequency = dict(zip(everything.get_feature_names_out(), counts, strict=True))
    top = sorted(frequency.values(), reverse=True)[:features]
    assert sorted((frequency[term] for term in ours.terms), reverse=True) == top
    theirs = theirs_on(train, ours.terms)  # which of equally frequent terms it keeps is unspecified
    expected = torch.from_numpy(theirs.transform(train).toarray()).float()
    torch.testing.assert_close(ours(train).cpu(), expected, rtol=0, atol=1e-6)


def test_of_equally_frequent_terms_the_first_in_the_alphabet_are_kept():
    assert BagOfWords(2).fit(["dd cc bb aa dd"]).terms == ["aa", "dd"]


def test_equals_scikit_learn_on_the_reviews():
    texts, _ = load_reviews()
    theirs = TfidfVectorizer().fit(texts[:160])
    expected = torch.from_numpy(theirs.transform(texts[160:]).toarray()).float()
    torch.testing.assert_close(
        BagOfWords().fit(texts[:160])(texts[160:]).cpu(), expected, rtol=0, atol=1e-6
    )


@settings(deadline=None, max_examples=50)
@given(TEXTS)
def test_rows_have_length_1_or_0(texts):
    words = BagOfWords().fit(FILMS)
    length = words([*texts, "", "unknown", "a film"]).norm(dim=1)
    assert length[-3:].round(decimals=6).tolist() == [0.0, 0.0, 1.0]
    assert (((length - 1).abs() < 1e-6) | (length == 0)).all()


def test_weights_come_from_the_training_split_alone():
    words = BagOfWords().fit(FILMS)
    x = words(["good film"])
    words(["film"] * 100)
    assert torch.equal(words(["good film"]), x)
    assert words(["brilliant"]).tolist() == [[0.0] * 4]


def test_batches_of_a_loader_are_lists_or_tuples():
    words = BagOfWords().fit(text for text in FILMS)
    (batch,) = DataLoader(FILMS, batch_size=3)
    assert torch.equal(words(batch), words(FILMS))
    assert torch.equal(words(tuple(FILMS)), words(FILMS))
    assert words([]).shape == (0, 4)


def test_statistics_are_state_and_load_into_a_fresh_module():
    fitted, fresh = BagOfWords().fit([*FILMS, "übel слово"]), BagOfWords(7)
    assert list(fitted.state_dict()) == ["vocabulary", "idf"]
    file = io.BytesIO()
    torch.save(torch.nn.Sequential(fitted).state_dict(), file)
    file.seek(0)
    torch.nn.Sequential(fresh).load_state_dict(torch.load(file, weights_only=True))
    assert fresh.terms == ["acting", "bad", "film", "good", "übel", "слово"]
    assert torch.equal(fresh(FILMS), fitted(FILMS))
    assert repr(fresh) == "BagOfWords(6)"
    assert repr(BagOfWords()) == "BagOfWords(unfitted)"


@pytest.mark.parametrize("assign", [False, True])
def test_other_statistics_replace_those_it_has_used(assign):
    words = BagOfWords().fit(["aa bb"])
    words(["aa"])
    words.load_state_dict(BagOfWords().fit(["bb cc"]).state_dict(), assign=assign)
    assert words(["bb"]).tolist() == [[1.0, 0.0]]


def test_statistics_of_another_size_do_not_replace_those_it_has():
    with pytest.raises(RuntimeError, match="size mismatch for vocabulary"):
        BagOfWords().fit(["aa bb"]).load_state_dict(BagOfWords().fit(FILMS).state_dict())


def test_it_moves_and_is_copied_with_its_model():
    words = BagOfWords().fit(FILMS)
    before = words(FILMS)
    assert torch.equal(copy.deepcopy(words)(FILMS), before)
    assert words.double()(FILMS).dtype == torch.float64
    assert words.half()(FILMS).dtype == torch.float16
    assert words.terms == ["acting", "bad", "film", "good"]  # bytes are no floating point numbers
    assert words.to("meta")._buffers["idf"].device.type == "meta"


# Errors.


def test_unfitted_raises():
    words = BagOfWords()
    assert not words.is_fitted
    with pytest.raises(RuntimeError, match="BagOfWords: not fitted"):
        words(["text"])
    with pytest.raises(RuntimeError, match="BagOfWords: not fitted"):
        _ = words.terms


def test_a_second_fit_raises():
    words = BagOfWords().fit(FILMS)
    with pytest.raises(RuntimeError, match="BagOfWords: fitted already"):
        words.fit(FILMS)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([], ValueError, "expected a word of two characters or more, got none in 0 texts"),
        (["", "a ?"], ValueError, "expected a word of two characters or more, got none in 2 texts"),
        ("text", TypeError, "expected `texts` as a list of strings, got one string"),
        (["text", 1], TypeError, "expected strings, got int"),
        ([["text"]], TypeError, "expected strings, got list"),
    ],
)
def test_what_has_no_terms_raises(texts, error, message):
    words = BagOfWords()
    with pytest.raises(error, match=f"BagOfWords: {message}"):
        words.fit(texts)
    assert not words.is_fitted
    if error is TypeError:
        with pytest.raises(error, match=f"BagOfWords: {message}"):
            BagOfWords().fit(FILMS)(texts)


@pytest.mark.parametrize("features", [0, -1])
def test_no_features_raise(features):
    with pytest.raises(ValueError, match=f"expected `features` of at least 1, got {features}"):
        BagOfWords(features)


# Reviews.


def test_reviews_are_240_different_ones_and_balanced():
    texts, labels = load_reviews()
    assert Counter(labels) == {"positive": 120, "negative": 120}
    assert len({text.lower() for text in texts}) == 240
    assert all(8 <= len(text.split()) <= 25 and text == text.strip() for text in texts)
    x = BagOfWords().fit(texts)(texts)
    assert (x @ x.T - torch.eye(240)).max() < 0.5  # no two are nearly the same


def test_a_bag_of_words_learns_the_reviews_but_not_all_of_them():
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline

    texts, labels = load_reviews()
    model = make_pipeline(TfidfVectorizer(), LogisticRegression())
    assert 0.8 < cross_val_score(model, texts, labels, cv=5).mean() < 0.95
