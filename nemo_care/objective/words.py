"""Similarity of two texts by their words: ROUGE for free text, word error rate for transcriptions.

Both are computed over all words of both texts, whatever their length: no text is shortened. The
alignment, which takes quadratic time, runs in RapidFuzz's bit-parallel code, 64 words at a time:
50,000 words against 50,000 take a fraction of a second.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

LONGEST_STEMMED = 100
"""Length limit, in characters, of words that are stemmed: the Porter stemmer's time grows with the
square of a word's length, and its recursion with the length. Longer words are compared
unchanged."""

# One word per character, since these scripts put no spaces between words.
_UNSPACED = ["Han", "Hiragana", "Katakana", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar"]


def rouge_f1(answer: str, solution: str) -> float:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L over stemmed words, in [0, 1].

    Equal to rouge_score's with its default tokenizer and stemmer if both texts are ASCII (and no
    word is longer than `LONGEST_STEMMED`). That tokenizer drops everything else: it scores two
    equal Chinese texts 0 (see `rouge_words`). A text of one word has no pairs of words, and
    therefore reaches at most 2/3.
    """
    from rapidfuzz.distance import LCSseq
    from rouge_score.scoring import fmeasure

    # Tokenised once; the scorer only counts n-grams.
    wanted, given = rouge_words(solution), rouge_words(answer)
    ngrams = _ngram_scorer().score(wanted, given)
    total = ngrams["rouge1"].fmeasure + ngrams["rouge2"].fmeasure
    if wanted and given:
        common = LCSseq.similarity(wanted, given)
        total += fmeasure(common / len(given), common / len(wanted))
    return _clip_to_unit(total / 3)


def rouge_words(text: str) -> list[str]:
    """Return the words that ROUGE compares: lower case, stemmed, without punctuation.

    A word is a run of letters and digits of any script; in Chinese, Japanese, Thai, Lao, Khmer and
    Burmese, which are written without spaces, every character is a word. Only ASCII words are
    stemmed: the stemmer is for English.
    """
    text = text.lower()
    if not text.isascii():
        import unicodedata

        # One spelling for letters that have several, such as composed and full-width ones.
        text = unicodedata.normalize("NFKC", text).lower()
    return [
        _stem(word) if 3 < len(word) <= LONGEST_STEMMED and word.isascii() else word
        for word in _word_pattern().findall(text)
    ]


def word_accuracy(answer: str, solution: str) -> float:
    """Return 1 - word error rate of a transcription, clipped to [0, 1]; words are split at spaces.

    A text without spaces is one word, right or wrong as a whole. `solution` has at least one word.
    """
    from rapidfuzz.distance import Levenshtein

    wanted, given = solution.split(), answer.split()
    # An answer with as many errors as words scores 0: the search for the distance can stop there.
    errors = Levenshtein.distance(wanted, given, score_cutoff=len(wanted))
    return _clip_to_unit(1.0 - errors / len(wanted))


@cache
def _word_pattern() -> Any:
    import regex

    unspaced = "".join(rf"\p{{{script}}}" for script in _UNSPACED)
    return regex.compile(
        rf"[{unspaced}]\p{{M}}*+|[[\p{{L}}\p{{M}}\p{{N}}]--[{unspaced}]]++", regex.V1
    )


@cache
def _ngram_scorer() -> Any:
    from rouge_score import rouge_scorer

    class AlreadyWords:
        """Accepts lists of words instead of texts."""

        @staticmethod
        def tokenize(words: Sequence[str]) -> Sequence[str]:
            return words

    return rouge_scorer.RougeScorer(["rouge1", "rouge2"], tokenizer=AlreadyWords())


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    return _stemmer().stem(word)


@cache
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


def _clip_to_unit(value: float) -> float:
    return max(0.0, min(1.0, float(value)))
