"""Texts with some of their words replaced, added, moved or left out, or rewritten by a model.

A word is a run of letters, with apostrophes and hyphens inside it (``don't``, ``well-known``). What
stands between two spaces and has a digit, a dot between letters, or one of ``_@#&=/\\<>`` is a
number, an address, a tag or the like, and stays as it is. So do spaces and punctuation marks.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from importlib.resources import files
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, TypeVar
from unicodedata import category

import torch
from torch import Tensor

Synonyms = Callable[[str], list[str]]  # of a word in lowercase; an empty list where it has none
Rewriter = Callable[[list[str]], list[str]]
Y = TypeVar("Y")

OPTIONS: dict[str, str] = {
    "replace": "share of the words with a synonym that give way to it, from 0 to 1",
    "insert": "share of the words with a synonym that is added somewhere, from 0 to 1",
    "swap": "share of the words that change places, from 0 to 1",
    "delete": "share of the words that are left out, from 0 to 1",
}

WORDNET = Path("/usr/share/wordnet")  # of Debian's package `wordnet-base`
PARTS = ("noun", "verb", "adj", "adv")

# `re` has no class for the marks that many scripts write around a letter, nor for digits like ½
MARKS = "".join(char for char in map(chr, range(2**16)) if category(char).startswith("M"))
NUMBERS = "".join(char for char in map(chr, range(2**16)) if category(char).startswith("N"))
CHUNK = re.compile(r"\S+")
FIXED = re.compile(rf"[\d{NUMBERS}_@#&=/\\<>]|\w\.\w")  # found in a chunk that stays as it is
LETTERS = rf"\w[\w{MARKS}]*"
WORD = re.compile(rf"{LETTERS}(?:['\u2019\u200c\u200d-]{LETTERS})*")

# Most are also the name of an element or a state in WordNet (he: helium), and a text in which
# another word stands for one of them is no sentence, or says the opposite.
FUNCTION_WORDS = """
a about above after again against all am an and any are as at be because been before being below
between both but by can could did do does doing down during each few for from further had has
have having he her here hers herself him himself his how i if in into is it its itself just less
may me might more most must my myself neither never no nor not now of off on once only or other
our ours ourselves out over own same shall she should so some such than that the their theirs
them themselves then there these they this those through to too under until up us very was we
were what when where which while who whom why will with without would you your yours yourself
"""


class TextAugment:
    """Change texts at random, each time another way, while their labels stay what they are.

    First some texts are rewritten, then in each text words are replaced, added, swapped and
    deleted, in this order. Everything is drawn from torch's default generator, so
    ``torch.manual_seed`` repeats it. It is no ``nn.Module``: a model that holds one saves nothing
    of it.

    Args:
        replace, insert, swap, delete: the `share` of :func:`replace_synonyms`,
            :func:`insert_synonyms`, :func:`swap_words` and :func:`delete_words`, in [0, 1].
        rewrite: expected share of the texts handed to ``rewriter``, in [0, 1]. Blank ones are not.
        synonyms: word in lowercase -> list of words. The default is ``load_synonyms("bundled")``,
            which is the same on every machine; ``load_synonyms()`` knows many more words.
        protected: words that stay as they are, such as ``("not", "never")``.
        rewriter: list of texts -> list of as many, such as :func:`back_translation` or
            :class:`Continue`; called once for a batch.

    Raises:
        ValueError: a share is outside [0, 1], or ``rewrite`` is above 0 without a ``rewriter``.
        TypeError: ``synonyms`` or ``rewriter`` cannot be called, or ``protected`` is one string.

    Example:
        >>> augment = TextAugment(replace=1.0, protected=["not"])
        >>> augment(["I saw that movie, NOT bad!"], ["positive"])
        (['I saw that film, NOT lousy!'], ['positive'])

    Source: the course, "Data augmentation", "For Text (NLP)"; Wei and Zou, "EDA: Easy Data
    Augmentation Techniques for Boosting Performance on Text Classification Tasks", 2019.
    """

    def __init__(
        self,
        *,
        replace: float = 0.0,
        insert: float = 0.0,
        swap: float = 0.0,
        delete: float = 0.0,
        rewrite: float = 0.0,
        synonyms: Synonyms | None = None,
        protected: Iterable[str] = (),
        rewriter: Rewriter | None = None,
    ) -> None:
        self.replace, self.insert, self.swap, self.delete = replace, insert, swap, delete
        self.rewrite, self.rewriter = rewrite, rewriter
        self.synonyms = load_synonyms("bundled") if synonyms is None else synonyms
        self.protected = _keys("TextAugment", protected)
        for name in (*OPTIONS, "rewrite"):
            _check_share("TextAugment", name, getattr(self, name))
        _check_callable("TextAugment", "synonyms", self.synonyms)
        if rewriter is not None:
            _check_callable("TextAugment", "rewriter", rewriter)
        elif rewrite > 0:
            raise ValueError(f"TextAugment: `rewrite` is {rewrite}: expected a `rewriter`")

    def __call__(self, texts: Sequence[str], y: Y) -> tuple[list[str], Y]:
        """Change ``texts``; ``y`` comes back as it is, the same object.

        Raises:
            TypeError: ``texts`` is not a list of strings.
            ValueError: the ``rewriter`` did not return as many texts as it got, none of them blank.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"TextAugment: expected `texts` as a list of strings, got {texts!r}")
        return [self._changed(text) for text in self._rewritten(texts)], y

    def _changed(self, text: str) -> str:
        if self.replace:
            text = replace_synonyms(text, self.replace, self.synonyms, self.protected)
        if self.insert:
            text = insert_synonyms(text, self.insert, self.synonyms, self.protected)
        if self.swap:
            text = swap_words(text, self.swap, self.protected)
        if self.delete:
            text = delete_words(text, self.delete, self.protected)
        return text

    def _rewritten(self, texts: Sequence[str]) -> list[str]:
        result: list[str] = list(texts)
        if self.rewriter is None or not self.rewrite:
            return result
        chosen = _drawn([i for i, text in enumerate(result) if text.strip()], self.rewrite)
        if not chosen:
            return result
        new = self.rewriter([result[i] for i in chosen])
        strings = isinstance(new, list) and all(isinstance(t, str) and t.strip() for t in new)
        if not strings or len(new) != len(chosen):
            raise ValueError(
                f"TextAugment: expected {len(chosen)} strings that are not blank from "
                f"`rewriter`, got {new!r}"
            )
        for i, text in zip(chosen, new, strict=True):
            result[i] = text
        return result


def replace_synonyms(
    text: str, share: float, synonyms: Synonyms, protected: Iterable[str] = ()
) -> str:
    """Replace words by synonyms; capitals carry over (Good -> Great, GOOD -> GREAT).

    Args:
        share: expected share, in [0, 1], of the words that have a synonym and are not protected:
            each gives way to one of its synonyms with this probability.
        synonyms: word in lowercase -> list of words; see :func:`load_synonyms`.
        protected: words that are not replaced, in any case.

    Raises:
        ValueError: ``share`` is outside [0, 1].
        TypeError: ``text`` is not a string, ``synonyms`` cannot be called, or ``protected`` is one
            string.

    Example:
        >>> replace_synonyms("Good dog, good!", 1.0, {"good": ["great"]}.get)
        'Great dog, great!'

    Source: the course, "Data augmentation", "For Text (NLP)"; Wei and Zou, 2019.
    """
    words = _free_words("replace_synonyms", text, share, protected)
    _check_callable("replace_synonyms", "synonyms", synonyms)
    edits = [
        (word.start(), word.end(), _cased(word[0], _one_of(found)))
        for word, found in _drawn(_with_synonyms(words, synonyms), share)
    ]
    return _edited(text, edits)


def insert_synonyms(
    text: str, share: float, synonyms: Synonyms, protected: Iterable[str] = ()
) -> str:
    """Add synonyms of words of the text, each before or after any word of it.

    Args:
        share: expected share, in [0, 1], of the words that have a synonym and are not protected: of
            each a synonym is added with this probability.
        synonyms: word in lowercase -> list of words; see :func:`load_synonyms`.
        protected: words of which no synonym is added, in any case.

    Raises:
        ValueError, TypeError: as of :func:`replace_synonyms`.

    Example:
        >>> insert_synonyms("A good dog.", 1.0, {"good": ["great"]}.get)
        'A good dog great.'

    Source: the course, "Data augmentation", "For Text (NLP)"; Wei and Zou, 2019.
    """
    words = _free_words("insert_synonyms", text, share, protected)
    _check_callable("insert_synonyms", "synonyms", synonyms)
    places = [(word.start(), "{} ") for word in _words(text)]
    places += [(word.end(), " {}") for word in _words(text)[-1:]]
    edits = []
    for _, found in _drawn(_with_synonyms(words, synonyms), share):
        place, form = _one_of(places)
        edits.append((place, place, form.format(_one_of(found))))
    return _edited(text, edits)


def swap_words(text: str, share: float, protected: Iterable[str] = ()) -> str:
    """Let words change places.

    The words form pairs at random, and one group of three if their number is odd; with probability
    ``share`` the words of a group move on, each to the place of the next. A capital at the
    beginning of a word stays at its place; ``I`` and words like ``NASA`` stay as they are.

    Args:
        share: expected share of the words that move, in [0, 1].
        protected: words that do not move, in any case.

    Raises:
        ValueError, TypeError: as of :func:`replace_synonyms`.

    Example:
        >>> swap_words("The dog barks.", 1.0)
        'Barks the dog.'

    Source: the course, "Data augmentation", "For Text (NLP)"; Wei and Zou, 2019.
    """
    words = _free_words("swap_words", text, share, protected)
    if len(words) < 2:
        return text
    order = torch.randperm(len(words), device="cpu").tolist()
    groups = [order[i : i + 2] for i in range(0, len(words) - 1, 2)]
    groups[-1] += order[2 * len(groups) :]
    edits = []
    for group in _drawn(groups, share):
        for i, j in zip(group, group[1:] + group[:1], strict=True):
            new = _capital_stays(words[j][0], words[i][0])
            edits.append((words[j].start(), words[j].end(), new))
    return _edited(text, edits)


def delete_words(text: str, share: float, protected: Iterable[str] = ()) -> str:
    """Leave words out, but never the last one that remains.

    With a word goes the space before it, or else the space after it.

    Args:
        share: probability, in [0, 1], with which each word is left out.
        protected: words that stay, in any case.

    Raises:
        ValueError, TypeError: as of :func:`replace_synonyms`.

    Example:
        >>> delete_words("Not a good dog!", 1.0, protected=["not", "dog"])
        'Not dog!'

    Source: the course, "Data augmentation", "For Text (NLP)"; Wei and Zou, 2019.
    """
    words = _free_words("delete_words", text, share, protected)
    deleted = _drawn(words, share)
    if deleted and len(deleted) == len(_words(text)):
        deleted.remove(_one_of(deleted))
    kept, last = "", 0
    for word in deleted:
        kept += text[last : word.start()]
        last = word.end()
        if kept.endswith(" "):
            kept = kept[:-1]
        elif text.startswith(" ", last):
            last += 1
    return kept + text[last:]


def load_synonyms(source: str | None = None) -> Synonyms:
    """A function from a word in lowercase to its synonyms, sorted.

    ``"bundled"`` is a list of some 700 everyday English words that comes with this package; the
    words of a group can stand for each other without a change of grammar or sentiment. WordNet has
    a hundred thousand, but of every sense and part of speech at once (good: also commodity). From
    WordNet come only single words in the form that the text has, no phrases (``hot_dog``), since a
    word must stay one word, no names, and nothing for function words such as ``not`` and ``in``.

    Args:
        source: ``"nltk"`` or ``"debian"`` for WordNet as NLTK or Debian's package has it, or
            ``"bundled"``. The default is the first of the three that is there, so what it returns
            depends on the machine.

    Raises:
        ImportError: NLTK is not installed.
        FileNotFoundError: the files of WordNet are not installed.
        ValueError: ``source`` is none of the three.

    Example:
        >>> load_synonyms("bundled")("good")
        ['fine', 'great']

    Source: Miller, "WordNet: A Lexical Database for English", 1995.
    """
    if source is not None and source not in SOURCES:
        raise ValueError(f"load_synonyms: expected {', '.join(SOURCES)}, got {source!r}")
    if source is not None:
        return SOURCES[source]()
    for load in SOURCES.values():
        try:
            return load()
        except (ImportError, FileNotFoundError):
            continue
    raise AssertionError("the bundled list is always there")


class Seq2Seq:
    """Texts as a sequence-to-sequence model of transformers rewrites them.

    ``generate`` draws from torch's default generator where ``do_sample`` is set. Where the model
    writes nothing, the text stays. Needs ``pip install 'torchref-triton[models]'``.

    Args:
        model: such as ``AutoModelForSeq2SeqLM.from_pretrained("Helsinki-NLP/opus-mt-en-fr")``; it
            is set to ``eval``.
        tokenizer: of that model.
        prefix: written before each text, such as ``"translate English to French: "`` for T5.
        generate: arguments of ``model.generate``, such as ``num_beams``.

    Raises:
        ValueError: ``num_return_sequences`` is not 1.

    Example:
        >>> french = Seq2Seq(*load("opus-mt-en-fr"))    # doctest: +SKIP
        >>> french(["The dog barks."])                  # doctest: +SKIP
        ['Le chien aboie.']

    Source: the course, "Data augmentation", "For Text (NLP)".
    """

    def __init__(self, model: Any, tokenizer: Any, prefix: str = "", **generate: Any) -> None:
        _check_generate("Seq2Seq", generate)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.prefix, self.generate = prefix, generate

    def __call__(self, texts: list[str]) -> list[str]:
        if not texts:
            return []
        prefixed = [self.prefix + text for text in texts]
        batch = _encoded(self.model, self.tokenizer, prefixed, "right")
        return _decoded(self.tokenizer, self.model.generate(**batch, **self.generate), texts)


class Continue:
    r"""Texts as a causal model of transformers continues a prompt; the prompt is left out.

    ``generate`` draws from torch's default generator where ``do_sample`` is set. Where the model
    writes nothing, the text stays. Needs ``pip install 'torchref-triton[models]'``.

    Args:
        model: such as ``AutoModelForCausalLM.from_pretrained("gpt2")``; it is set to ``eval``.
        tokenizer: of that model, with a token for padding.
        prompt: in which ``{text}`` stands for the text.
        generate: arguments of ``model.generate``, such as ``max_new_tokens`` and ``do_sample``.

    Raises:
        ValueError: ``prompt`` has no ``{text}``, the tokenizer has no token for padding, or
            ``num_return_sequences`` is not 1.

    Example:
        >>> paraphrase = Continue(model, tokenizer, max_new_tokens=30)      # doctest: +SKIP
        >>> TextAugment(rewrite=0.1, rewriter=paraphrase)                   # doctest: +SKIP

    Source: the course, "Data augmentation", "For Text (NLP)".
    """

    def __init__(
        self, model: Any, tokenizer: Any, prompt: str = "Paraphrase: {text}\n", **generate: Any
    ) -> None:
        _check_generate("Continue", generate)
        if "{text}" not in prompt:
            raise ValueError(f"Continue: expected {{text}} in `prompt`, got {prompt!r}")
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "Continue: expected a `tokenizer` with a token for padding; set "
                "`tokenizer.pad_token = tokenizer.eos_token`"
            )
        self.model, self.tokenizer = model.eval(), tokenizer
        self.prompt = prompt
        self.generate = {"pad_token_id": tokenizer.pad_token_id, **generate}

    def __call__(self, texts: list[str]) -> list[str]:
        if not texts:
            return []
        prompts = [self.prompt.replace("{text}", text) for text in texts]
        # padding on the left, so that every prompt ends where writing begins
        batch = _encoded(self.model, self.tokenizer, prompts, "left")
        ids = self.model.generate(**batch, **self.generate)[:, batch["input_ids"].shape[1] :]
        return _decoded(self.tokenizer, ids, texts)


def back_translation(there: Rewriter, back: Rewriter) -> Rewriter:
    """Texts translated into another language by ``there`` and from it by ``back``.

    Example:
        >>> rewriter = back_translation(lambda texts: [t.upper() for t in texts],
        ...                             lambda texts: [t.lower() for t in texts])
        >>> rewriter(["The dog barks."])
        ['the dog barks.']

    Source: the course, "Data augmentation", "For Text (NLP)"; Sennrich, Haddow and Birch,
    "Improving Neural Machine Translation Models with Monolingual Data", 2016.
    """
    return lambda texts: back(there(texts))


# Words and edits.


def _words(text: str) -> list[re.Match[str]]:
    return [
        word
        for chunk in CHUNK.finditer(text)
        if not FIXED.search(chunk[0])
        for word in WORD.finditer(text, chunk.start(), chunk.end())
    ]


def _free_words(
    name: str, text: str, share: float, protected: Iterable[str]
) -> list[re.Match[str]]:
    """The words that may change, after a check of the arguments of the function ``name``."""
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected `text` as a string, got {type(text).__name__}")
    _check_share(name, "share", share)
    protected = _keys(name, protected)
    return [word for word in _words(text) if _key(word[0]) not in protected]


def _key(word: str) -> str:
    return word.lower().replace("\u2019", "'")  # a curly apostrophe


def _keys(name: str, words: Iterable[str]) -> frozenset[str]:
    if isinstance(words, str):
        raise TypeError(f"{name}: expected `protected` as a list of words, got {words!r}")
    return frozenset(_key(word) for word in words)


def _with_synonyms(
    words: list[re.Match[str]], synonyms: Synonyms
) -> list[tuple[re.Match[str], list[str]]]:
    pairs = [(word, synonyms(_key(word[0]))) for word in words]
    return [(word, found) for word, found in pairs if found]


def _drawn(items: Sequence[Any], share: float) -> list[Any]:
    """Each of ``items`` with probability ``share``, in their order."""
    chosen = torch.rand(len(items), device="cpu") < share
    return [item for item, yes in zip(items, chosen.tolist(), strict=True) if yes]


def _one_of(items: Sequence[Any]) -> Any:
    return items[int(torch.randint(len(items), (), device="cpu"))]


def _cased(old: str, new: str) -> str:
    """``new`` with the capitals of ``old``."""
    if len(old) > 1 and old.isupper():
        return new.upper()
    return new[0].upper() + new[1:] if old[0].isupper() else new


def _capital_stays(old: str, new: str) -> str:
    """``new`` as it stands where ``old`` stood."""
    for word in (old, new):
        if word[1:] != word[1:].lower() or re.match(r"I\b", word):
            return new
    return (new[0].upper() if old[0].isupper() else new[0].lower()) + new[1:]


def _edited(text: str, edits: list[tuple[int, int, str]]) -> str:
    """``text`` with new strings from start to end, none of which overlap."""
    parts, last = [], 0
    for start, end, new in sorted(edits, key=lambda edit: edit[0]):
        parts += [text[last:start], new]
        last = end
    return "".join(parts) + text[last:]


def _check_share(name: str, argument: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name}: expected `{argument}` in [0, 1], got {share}")


def _check_callable(name: str, argument: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{name}: expected `{argument}` as a function, got {type(value).__name__}")


# Synonyms.


def _load_nltk() -> Synonyms:
    try:
        from nltk.corpus import wordnet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("load_synonyms: no NLTK; pip install nltk") from None
    try:
        wordnet.ensure_loaded()
    except LookupError:
        raise FileNotFoundError(
            "load_synonyms: NLTK has no WordNet; python -m nltk.downloader wordnet"
        ) from None
    return _nltk_synonyms


def _nltk_synonyms(word: str) -> list[str]:
    from nltk.corpus import wordnet  # pyright: ignore[reportMissingImports]

    return _single_words(word, [synset.lemma_names() for synset in wordnet.synsets(word)])


def _load_debian() -> Synonyms:
    names = [f"{file}.{part}" for file in ("index", "data") for part in PARTS]
    if not all((WORDNET / name).exists() for name in names):
        raise FileNotFoundError(f"load_synonyms: no WordNet in {WORDNET}; apt install wordnet-base")
    return _debian_synonyms


def _debian_synonyms(word: str) -> list[str]:
    return list(_looked_up(WORDNET, word))


@lru_cache(2**16)
def _looked_up(folder: Path, word: str) -> tuple[str, ...]:
    """Synonyms out of the index files, whose lines are sorted, and what they point to.

    ``word part synsets pointers [symbol...] synsets tagged [offset...]`` is a line of an index,
    ``offset file part words(hexadecimal) [word id...] ...`` one of the data; see wndb(5WN).
    """
    synsets = []
    for part in PARTS:
        line = _line_of(_mapped(folder / f"index.{part}"), word.encode())
        for offset in line[-int(line[2]) :] if line else []:
            data = _mapped(folder / f"data.{part}")
            fields = data[int(offset) : data.find(b"\n", int(offset))].decode().split(" ")
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            synsets.append([re.sub(r"\(.*\)", "", name) for name in words])  # awake(p)
    return tuple(_single_words(word, synsets))


@cache
def _mapped(path: Path) -> mmap:
    with open(path, "rb") as file:
        return mmap(file.fileno(), 0, access=ACCESS_READ)


def _line_of(index: mmap, word: bytes) -> list[bytes]:
    """The fields of the line that begins with ``word``, found by bisection."""
    low, high = 0, len(index)
    while word and low < high:
        start = index.rfind(b"\n", 0, (low + high) // 2) + 1
        end = index.find(b"\n", start)
        fields = index[start:end].split()
        key = b"" if index[start : start + 1] == b" " else fields[0]  # the license comes first
        if key == word:
            return fields
        low, high = (end + 1, high) if key < word else (low, start)
    return []


def _single_words(word: str, synsets: list[list[str]]) -> list[str]:
    """Other words of the synsets of ``word``, in the form in which it stands in the text."""
    if word in FUNCTION_WORDS.split():
        return []
    found = {name for names in synsets if word in names for name in names} - {word}
    return sorted(
        name for name in found if name.islower() and [w[0] for w in _words(name)] == [name]
    )


def _load_bundled() -> Synonyms:
    return _bundled_synonyms


def _bundled_synonyms(word: str) -> list[str]:
    return [other for other in _bundled().get(word, ()) if other != word]


@cache
def _bundled() -> dict[str, list[str]]:
    """Each word and its group."""
    text = files("torchref.data").joinpath("files", "synonyms.txt").read_text("utf-8")
    groups = [sorted(line.split(", ")) for line in text.splitlines() if not line.startswith("#")]
    return {word: group for group in groups for word in group}


SOURCES: dict[str, Callable[[], Synonyms]] = {
    "nltk": _load_nltk,
    "debian": _load_debian,
    "bundled": _load_bundled,
}


# Models.


def _check_generate(name: str, generate: dict[str, Any]) -> None:
    if generate.get("num_return_sequences", 1) != 1:
        raise ValueError(
            f"{name}: expected one text for each, got `num_return_sequences` "
            f"{generate['num_return_sequences']}"
        )


def _encoded(model: Any, tokenizer: Any, texts: list[str], side: str) -> dict[str, Tensor]:
    batch = tokenizer(
        texts, padding=True, padding_side=side, truncation=True, return_tensors="pt"
    ).to(model.device)
    # a tokenizer may make `token_type_ids`, which `generate` refuses
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _decoded(tokenizer: Any, ids: Tensor, texts: list[str]) -> list[str]:
    """What ``ids`` say, or the text where they say nothing."""
    written = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [new.strip() or text for new, text in zip(written, texts, strict=True)]
