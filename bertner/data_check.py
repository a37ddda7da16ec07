"""What is wrong or odd in annotated data, looked for before anything is trained on them.

`check_data` looks at every word. `check_datasets` is for each start of training: it says what the
arrays tell that are there anyway.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import combinations, islice

import numpy as np

from bertner.analysis import FAMILIARITY, familiarity, take_inventory
from bertner.config import Reading
from bertner.corpus import Corpus, CorpusSummary
from bertner.data import CARD_READING, NumberArray, TokenDataset, begins_word, sum_parts
from bertner.findings import SEVERITIES, DataCheck, Example, Finding, SplitFacts, share
from bertner.labels import IntArray, O, find_spans
from bertner.repeats import (
    OUTSIDE,
    Numbered,
    Repeats,
    Uses,
    count_shared,
    find_repeats,
    find_uses,
)
from bertner.tokenizer import Tokenizer

_KEPT_EXAMPLES = 100  # of a finding
_ENCODED_WORDS = 50_000  # at a time

# What concerns a larger share of a split is more than a note.
_WORTH_A_WARNING = 0.01
# Of a type with fewer entities little is learnt.
_FEW_ENTITIES = 10
# A type may stand for another one if it is so much like it, as PERS is like PER, and PERCENT is not
# like PERSON, and has so small a share of its entities.
_ALIKE, _SHARE_OF_ALIKE = 0.65, 0.05
_MAX_COMPARED_TYPES = 200
# A string that is used so often, and but for so small a share in one way: those are slips.
_OFTEN, _SHARE_OF_SLIPS = 10, 0.05

_MAX_TEXT = 1_000  # characters of an example that are kept

_PERCENTILES = {"p50": 50, "p95": 95, "p99": 99, "max": 100}


def check_data(
    corpora: Mapping[str, Corpus],
    tokenizer: Tokenizer,
    reading: Reading = CARD_READING,
    on_step: Callable[[], object] = lambda: None,
) -> DataCheck:
    """Looks at every word of all splits; takes time and memory in proportion to them.

    Args:
        corpora: By split; the first is the training data.
        tokenizer: The model's tokenizer.
        reading: What a row will be.
        on_step: Is called as many times as there are splits, and two times more.
    """
    vocabulary = _Vocabulary(tokenizer)
    row_limit = tokenizer.row_limit(reading.max_seq_length)
    kinds = sorted({kind for corpus in corpora.values() for kind in corpus.type_names})
    number_of = {kind: number for number, kind in enumerate(kinds)}
    splits = []
    for name, corpus in corpora.items():
        splits.append(_Split(name, corpus, vocabulary, number_of, row_limit - 2))
        on_step()

    def locate(name: str, kind: str, text: str) -> list[Example]:
        split = next(each for each in splits if each.name == name)
        span = int(np.argmax(split.numbered.spans.type == number_of[kind]))
        return [split.example(int(split.numbered.spans.start[span]), text)]

    repeats = find_repeats([split.numbered for split in splits])
    on_step()
    uses = find_uses([split.numbered for split in splits])
    on_step()
    train, *_ = splits
    inventory = take_inventory(train.corpus.blocks(), train.corpus.type_names)
    facts = {}
    for split in splits:
        by_training = None
        if split is not train:
            of_each = familiarity(split.corpus, split.numbered.spans, kinds, inventory)
            counts = np.bincount(of_each, minlength=len(FAMILIARITY)).tolist()
            by_training = dict(zip(FAMILIARITY, counts, strict=True))
        facts[split.name] = split.facts(by_training)
    findings = [
        *_about_types({name: each.entity_counts for name, each in facts.items()}, locate),
        *_about_schemes({name: each.scheme for name, each in facts.items()}),
        *(finding for split in splits for finding in _about_tags(split)),
        *(finding for split in splits for finding in _about_documents(split, reading)),
        *_about_repeats(repeats, splits),
        *_about_uses(uses, splits, vocabulary.words, kinds),
        *(finding for split in splits for finding in _about_words(split, vocabulary)),
        *(finding for split in splits for finding in _about_lengths(split)),
    ]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return DataCheck(row_limit, facts, tuple(findings))


def check_datasets(
    corpora: Mapping[str, CorpusSummary],
    datasets: Mapping[str, TokenDataset],
    tokenizer: Tokenizer,
) -> list[Finding]:
    """What prepared data tell at no cost: findings without examples, and no notes.

    Args:
        corpora: What each split holds; the first is the training data.
        datasets: Its tokens.
        tokenizer: The model's tokenizer.
    """
    findings = [
        *_about_types({name: corpus.entity_counts for name, corpus in corpora.items()}),
        *_about_schemes({name: corpus.scheme for name, corpus in corpora.items()}),
    ]
    for (name, dataset), (later_name, later) in combinations(datasets.items(), 2):
        num_shared = count_shared(
            (dataset.input_ids, dataset.sentence_token_starts),
            (later.input_ids, later.sentence_token_starts),
        )
        num_sentences = len(later.sentence_lines)
        findings += _shared(name, later_name, num_shared, num_sentences, "as wordpieces")
    for name, dataset in datasets.items():
        unknown = dataset.word_ids[dataset.input_ids == tokenizer.unk_id]
        num_unknown = int(np.count_nonzero(begins_word(unknown)))
        findings += _unknown(name, num_unknown, len(dataset.word_labels))
    return [finding for finding in findings if finding.severity != "note"]


class _Vocabulary:
    """Numbers all words, the same in all splits, and knows what the tokenizer makes of each.

    Attributes:
        words: In order of their numbers.
        num_pieces: (num_words,) wordpieces of each.
        lacks: For each word that has an unknown piece the character that the tokenizer's vocabulary
            lacks, or "" if the word is unknown for its length.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.words: list[str] = []
        self.num_pieces: IntArray = np.zeros(0, dtype=np.int32)
        self.lacks: dict[int, str] = {}
        self._number_of: dict[str, int] = {}
        self._tokenizer = tokenizer
        self._pieces = tokenizer.fast.get_vocab()

    def number(self, words: Sequence[str]) -> IntArray:
        """(num_words,) the number of each word; learns new ones."""
        number_of = self._number_of
        numbers: IntArray = np.fromiter(
            (number_of.setdefault(word, len(number_of)) for word in words), np.int32, len(words)
        )
        new = islice(number_of, len(self.words), None)
        while part := list(islice(new, _ENCODED_WORDS)):
            self._tokenize(part)
        return numbers

    def _tokenize(self, words: list[str]) -> None:
        encoding = self._tokenizer.encode(words)
        word_of = np.array(encoding.word_ids, dtype=np.int64)
        ids = np.array(encoding.ids, dtype=np.int64)
        unknown = np.flatnonzero(ids == self._tokenizer.unk_id).tolist()
        offsets = encoding.offsets if unknown else []
        for piece in unknown:
            word, (begin, end) = int(word_of[piece]), offsets[piece]
            self.lacks.setdefault(len(self.words) + word, self._lacking(words[word][begin:end]))
        counts = np.bincount(word_of, minlength=len(words)).astype(np.int32)
        self.num_pieces = np.append(self.num_pieces, counts)
        self.words += words

    def _lacking(self, text: str) -> str:
        """The first character of an unknown piece at which WordPiece finds no way on."""
        normalizer, model = self._tokenizer.fast.normalizer, self._tokenizer.fast.model
        text = text if normalizer is None else normalizer.normalize_str(text).strip()
        begin, prefix = 0, ""
        while begin < len(text) <= model.max_input_chars_per_word:
            ends = range(len(text), begin, -1)
            end = next((end for end in ends if prefix + text[begin:end] in self._pieces), None)
            if end is None:
                return text[begin]
            begin, prefix = end, model.continuing_subword_prefix
        return ""


class _Split:
    """A split, in words and in numbers.

    Attributes:
        name: "train", "validation" or "test".
        corpus: Its sentences.
        numbered: The same in numbers.
        limit: Most tokens in a row, without special tokens.
        num_pieces: (num_words,) wordpieces of each word.
        lengths: (num_sentences,) those of each sentence that are read.
    """

    def __init__(
        self,
        name: str,
        corpus: Corpus,
        vocabulary: _Vocabulary,
        number_of: Mapping[str, int],
        limit: int,
    ) -> None:
        self.name = name
        self.corpus = corpus
        # The last element is for O, whose type is -1.
        numbers = np.array([*map(number_of.__getitem__, corpus.type_names), -1], dtype=np.int32)
        types = numbers[corpus.types]
        self.numbered = Numbered(
            words=vocabulary.number(corpus.words),
            tags=np.where(corpus.prefixes == O, 0, 2 * types + corpus.prefixes),
            starts=corpus.starts,
            spans=find_spans(corpus.prefixes, types, corpus.starts[:-1]),
        )
        self.limit = limit
        self.num_pieces = vocabulary.num_pieces[self.numbered.words]
        read = np.minimum(self.num_pieces, limit)
        self.lengths: NumberArray = sum_parts(read, corpus.starts, np.int64)

    def example(self, word: int, text: str) -> Example:
        """An example at a word."""
        return Example(self.corpus.source, int(self.corpus.lines[word]), text[:_MAX_TEXT])

    def sentence_example(self, sentence: int, before: str = "") -> Example:
        """An example at a sentence: its words, and what is to stand before them."""
        words = " ".join(self.corpus.sentence(sentence))
        return self.example(int(self.corpus.starts[sentence]), before + words)

    def place(self, word: int, seen_from: _Split) -> str:
        """Where a word stands, for an example of a split."""
        line = f"line {self.corpus.lines[word]}"
        return line if self is seen_from else f"{self.name} {line}"

    def facts(self, by_training: dict[str, int] | None) -> SplitFacts:
        """What there is to tell of it."""
        corpus = self.corpus
        percents = list(_PERCENTILES.values())
        lengths = np.percentile(self.lengths + 2, percents, method="higher").tolist()
        with_entities = sum_parts(self.numbered.tags > 0, corpus.starts, np.int64) > 0
        return SplitFacts(
            source=corpus.source,
            scheme=corpus.scheme,
            num_documents=corpus.num_documents,
            num_sentences=corpus.num_sentences,
            num_with_entities=int(np.count_nonzero(with_entities)),
            num_words=corpus.num_words,
            entity_counts=corpus.entity_counts(),
            by_training=by_training,
            lengths=dict(zip(_PERCENTILES, lengths, strict=True)),
            num_cut=int(np.count_nonzero(self.lengths > self.limit)),
        )


# Types and schemes

# Gives the first entity of a type in a split as an example, with a text; or nothing.
_Locate = Callable[[str, str, str], list[Example]]


def _about_types(
    counts: Mapping[str, Mapping[str, int]], locate: _Locate = lambda split, kind, text: []
) -> Iterator[Finding]:
    """What the numbers of entities tell.

    Args:
        counts: By split and type; the first split is the training data.
        locate: Finds examples.
    """
    train, *others = counts
    totals: Counter[str] = Counter()
    for count_of in counts.values():
        totals.update(count_of)

    def examples(split: str, types: Mapping[str, int]) -> tuple[Example, ...]:
        return _kept(e for kind, n in types.items() for e in locate(split, kind, f"{kind} ({n:,})"))

    for name in counts:
        if not any(counts[name].values()):
            is_train = name == train
            yield Finding(
                "error" if is_train else "warning",
                "no entities",
                f"{name}: every tag is O",
                "There is nothing to learn." if is_train else "Scores on it will say nothing.",
                1,
            )
    for name in others:
        missing = {kind: n for kind, n in counts[name].items() if n and kind not in counts[train]}
        if missing:
            num_entities = sum(missing.values())
            yield Finding(
                "error",
                "types not in training",
                f"{name}: {_number(num_entities, 'entity', 'entities')} of types that {train} "
                f"lacks: {_listed(missing)}",
                "Training refuses them: correct the tags, or train on data that have such types.",
                num_entities,
                examples(name, missing),
            )
    if alike := _alike_types(totals):
        pairs = [
            f"{kind:.30} ({totals[kind]:,}) beside {other:.30} ({totals[other]:,})"
            for kind, other in islice(alike.items(), 5)
        ]
        split_of = {kind: next(name for name in counts if counts[name].get(kind)) for kind in alike}
        yield Finding(
            "warning",
            "types alike",
            f"{_number(len(alike), 'type')} may stand for another one: {', '.join(pairs)}",
            "Each spelling is a type of its own; correct the tags if the same is meant.",
            len(alike),
            _kept(e for kind in alike for e in examples(split_of[kind], {kind: totals[kind]})),
        )
    types = {kind: n for kind, n in counts[train].items() if n and kind not in alike}
    rare = {kind: n for kind, n in types.items() if n < _FEW_ENTITIES}
    if rare:
        yield Finding(
            "warning",
            "rare types",
            f"{train}: {_number(len(rare), 'type')} with fewer than {_FEW_ENTITIES} entities: "
            f"{_listed(rare)}",
            "They are too few to learn much from.",
            len(rare),
            examples(train, rare),
        )
    for name in others:
        absent = {kind: n for kind, n in types.items() if not counts[name].get(kind)}
        if absent and any(counts[name].values()):
            yield Finding(
                "note",
                "types not scored",
                f"{name}: lacks {_number(len(absent), 'type')} of {train}: {_listed(absent)}",
                "Its scores will not tell how well they are learnt.",
                len(absent),
                examples(train, absent),
            )


def _alike_types(totals: Mapping[str, int]) -> dict[str, str]:
    """Types that are another one in other letters, or nearly so and far rarer; with that other."""
    by_count = sorted((kind for kind in totals if totals[kind]), key=lambda k: (-totals[k], k))
    first: dict[str, str] = {}
    pairs = ((kind, first.setdefault(kind.casefold(), kind)) for kind in by_count)
    alike = {kind: other for kind, other in pairs if kind != other}
    for other, kind in combinations(by_count[:_MAX_COMPARED_TYPES], 2):
        is_rare = totals[kind] <= _SHARE_OF_ALIKE * totals[other]
        if is_rare and kind not in alike and _are_alike(kind.casefold(), other.casefold()):
            alike[kind] = other
    return alike


def _are_alike(kind: str, other: str) -> bool:
    if re.sub(r"\d", "", kind) == re.sub(r"\d", "", other):  # T1 and T2
        return False
    # Of event-sport and event-war, what they have in common says nothing.
    parts, other_parts = (re.split(r"[\W_]+", name) for name in (kind, other))
    while len(parts) > 1 and len(other_parts) > 1 and parts[0] == other_parts[0]:
        del parts[0], other_parts[0]
    kind, other = "".join(parts), "".join(other_parts)
    matcher = SequenceMatcher(None, kind, other, autojunk=False)
    return kind.startswith(other) or matcher.ratio() >= _ALIKE


def _about_schemes(schemes: Mapping[str, str]) -> Iterator[Finding]:
    if len(set(schemes.values())) > 1:
        each = ", ".join(f"{scheme} in {name}" for name, scheme in schemes.items())
        yield Finding(
            "warning",
            "schemes",
            f"the splits differ in their tag scheme: {each}",
            "Each is read as what it is, so nothing is lost; but they were made in different ways.",
            len(set(schemes.values())),
        )


def _about_tags(split: _Split) -> Iterator[Finding]:
    corpus = split.corpus
    if corpus.num_misfits:
        yield Finding(
            "warning",
            "misfits",
            f"{split.name}: {_number(corpus.num_misfits, 'tag')} not allowed by {corpus.scheme} "
            "where they stand",
            "They are read as conlleval does: an I or E that continues no entity begins one. "
            "Correct them if that is not meant.",
            corpus.num_misfits,
            tuple(
                Example(
                    corpus.source,
                    each.line,
                    f"{each.tag} on {each.word!r:.40}, after {each.before or 'the start'}, before "
                    f"{each.after or 'the end'}",
                )
                for each in corpus.misfits
            ),
        )


def _about_documents(split: _Split, reading: Reading) -> Iterator[Finding]:
    if reading.context != "none" and not split.corpus.marks_documents:
        yield Finding(
            "error",
            "no documents",
            f"{split.name}: does not say where documents begin, which --context document needs",
            "Add -DOCSTART- lines or a document_id column (--document_column_name), or give "
            "--context none.",
            1,
        )


# Sentences and strings that stand more than once


def _shared(
    earlier: str,
    later: str,
    num_shared: int,
    num_sentences: int,
    how: str = "",
    examples: Iterable[Example] = (),
) -> Iterator[Finding]:
    """Sentences of a later split that stand in an earlier one too."""
    if num_shared:
        yield Finding(
            _gravity(num_shared, num_sentences),
            "shared sentences",
            f"{later}: {_part(num_shared, num_sentences, 'sentence')} also in {earlier}"
            + (f", {how}" if how else ""),
            "Short ones recur by themselves. Long ones are copies, and scores on them too good: "
            "remove them from one of the two.",
            num_shared,
            _kept(examples),
        )


def _about_repeats(repeats: Repeats, splits: Sequence[_Split]) -> Iterator[Finding]:
    def examples(
        split: _Split, other: _Split, pairs: Sequence[tuple[int, int]]
    ) -> Iterator[Example]:
        lengths = np.diff(split.corpus.starts)
        for here, there in heapq.nlargest(_KEPT_EXAMPLES, pairs, lambda pair: lengths[pair[0]]):
            place = other.place(int(other.corpus.starts[there]), split)
            yield split.sentence_example(here, f"as {place}: ")

    for (a, b), pairs in repeats.across.items():
        num_other = repeats.num_other[a, b]
        yield from _shared(
            splits[a].name,
            splits[b].name,
            len(pairs),
            splits[b].corpus.num_sentences,
            f"{num_other:,} of them with other tags" if num_other else "",
            examples(splits[b], splits[a], pairs),
        )
    for split, pairs in zip(splits, repeats.within, strict=True):
        if pairs:
            yield Finding(
                "note",
                "repeated sentences",
                f"{split.name}: {_part(len(pairs), split.corpus.num_sentences, 'sentence')} "
                "repeat an earlier one",
                "What stands several times counts several times, in training and in scores.",
                len(pairs),
                _kept(examples(split, split, pairs)),
            )
    if repeats.differing:
        yield Finding(
            "warning",
            "sentences tagged differently",
            f"{_number(len(repeats.differing), 'sentence')} with other tags than the same words "
            "elsewhere",
            "At most one of two can be right: correct the other.",
            len(repeats.differing),
            _kept(
                _first_difference(splits[a], there, splits[b], here)
                for (a, there), (b, here) in repeats.differing
            ),
        )


def _first_difference(first: _Split, there: int, split: _Split, here: int) -> Example:
    """The first word that is tagged otherwise in the same words elsewhere."""
    corpus, other = split.corpus, first.corpus
    begin, end = corpus.starts[here], corpus.starts[here + 1]
    begin_there = other.starts[there]
    tags_there = first.numbered.tags[begin_there : begin_there + end - begin]
    k = int(np.argmax(split.numbered.tags[begin:end] != tags_there))
    word, word_there = int(begin) + k, int(begin_there) + k
    text = " ".join(corpus.sentence(here))
    return split.example(
        word,
        f"{corpus.words[word]!r:.40} is {_tag(corpus, word)}, {_tag(other, word_there)} in "
        f"{first.place(word_there, split)}: {text}",
    )


def _tag(corpus: Corpus, word: int) -> str:
    prefix = corpus.prefixes[word]
    return "O" if prefix == O else f"{'OBI'[prefix]}-{corpus.type_names[corpus.types[word]]:.30}"


def _about_uses(
    uses: Uses, splits: Sequence[_Split], words: Sequence[str], kinds: Sequence[str]
) -> Iterator[Finding]:
    """Strings that are entities of several types, or of one and sometimes of none.

    Where one use is far more frequent than all others, those are taken for slips.
    """

    def named(kind: int) -> str:
        return "no entity" if kind == OUTSIDE else f"{kinds[kind]:.30}"

    def quoted(string: Sequence[int]) -> str:
        return repr(" ".join(words[number] for number in string))

    slips, mixed = [], []
    for string, by_kind in uses.items():
        if len(by_kind) < 2:
            continue
        ranked = sorted(by_kind.items(), key=lambda item: -item[1].count)
        num_other = sum(use.count for _, use in ranked[1:])
        total = ranked[0][1].count + num_other
        if total >= _OFTEN and num_other <= _SHARE_OF_SLIPS * total:
            slips.append((num_other / total, string, ranked))
        else:
            mixed.append((-num_other, string, ranked))
    if slips:
        slips.sort()
        num_slips = sum(use.count for _, _, ranked in slips for _, use in ranked[1:])
        yield Finding(
            "warning",
            "slips",
            f"{_number(num_slips, 'place')} where a string is not tagged as it nearly always is",
            "Probably slips of the annotation: look at each.",
            num_slips,
            _kept(
                splits[use.split].example(
                    use.word,
                    f"{quoted(string)} is {named(kind)}"
                    + (f" (the first of {use.count})" if use.count > 1 else "")
                    + f", but {named(ranked[0][0])} {ranked[0][1].count:,} times",
                )
                for _, string, ranked in slips
                for kind, use in ranked[1:]
            ),
        )
    if mixed:
        mixed.sort()
        yield Finding(
            "note",
            "strings tagged differently",
            f"{_part(len(mixed), len(uses), 'entity string')} tagged in more than one way",
            "Some are ambiguous by nature; where a rule decides, see that it was kept.",
            len(mixed),
            _kept(
                splits[ranked[1][1].split].example(
                    ranked[1][1].word,
                    f"{quoted(string)} is {named(ranked[1][0])} here; "
                    + ", ".join(f"{named(kind)} {use.count:,}" for kind, use in ranked[:6]),
                )
                for _, string, ranked in mixed
            ),
        )


# Words and lengths


def _unknown(
    name: str,
    num_unknown: int,
    num_words: int,
    lacks: Mapping[str, int] | None = None,
    examples: Iterable[Example] = (),
) -> Iterator[Finding]:
    """Words that have an unknown piece."""
    if num_unknown:
        reasons = [
            f"{character} (U+{ord(character):04X}) in {count:,}"
            if character
            else f"too long {count:,}"
            for character, count in Counter(lacks or {}).most_common(8)
        ]
        yield Finding(
            _gravity(num_unknown, num_words),
            "unknown words",
            f"{name}: {_part(num_unknown, num_words, 'word')} that the model's vocabulary cannot "
            "spell" + (f": {', '.join(reasons)}" if reasons else ""),
            "The model reads [UNK] there; if they are many, is it a model for this language?",
            num_unknown,
            _kept(examples),
        )


def _about_words(split: _Split, vocabulary: _Vocabulary) -> Iterator[Finding]:
    """Words that the model does not see, or only in part."""
    numbers, corpus = split.numbered.words, split.corpus

    def examples(words: IntArray) -> Iterator[Example]:
        return (split.example(word, repr(corpus.words[word])) for word in words.tolist())

    is_unknown = np.zeros(len(vocabulary.words), dtype=bool)
    is_unknown[list(vocabulary.lacks)] = True
    unknown = np.flatnonzero(is_unknown[numbers])
    lacks = Counter(vocabulary.lacks[number] for number in numbers[unknown].tolist())
    yield from _unknown(split.name, len(unknown), corpus.num_words, lacks, examples(unknown))
    unseen = np.flatnonzero(split.num_pieces == 0)
    if len(unseen):
        num_tagged = int(np.count_nonzero(split.numbered.tags[unseen]))
        yield Finding(
            "warning" if num_tagged else "note",
            "unseen words",
            f"{split.name}: {_number(len(unseen), 'word')} of nothing but characters that the "
            "tokenizer drops" + (f", {num_tagged:,} of them in entities" if num_tagged else ""),
            "The model does not see them, and they are always tagged O.",
            len(unseen),
            _kept(split.example(word, ascii(corpus.words[word])) for word in unseen.tolist()),
        )
    long = np.flatnonzero(split.num_pieces > split.limit)
    if len(long):
        yield Finding(
            "warning",
            "long words",
            f"{split.name}: {_number(len(long), 'word')} of more than {split.limit} wordpieces, "
            "which no row holds",
            "Their later pieces are not read.",
            len(long),
            _kept(examples(long)),
        )


def _about_lengths(split: _Split) -> Iterator[Finding]:
    starts, num_sentences = split.corpus.starts, split.corpus.num_sentences
    cut = np.flatnonzero(split.lengths > split.limit)
    if len(cut):
        longest = cut[np.argsort(-split.lengths[cut], kind="stable")]
        yield Finding(
            _gravity(len(cut), num_sentences),
            "cut sentences",
            f"{split.name}: {_part(len(cut), num_sentences, 'sentence')} of more than "
            f"{split.limit + 2} tokens",
            "They are cut between words into rows that overlap, and nothing is lost. If they are "
            "no sentences, there may be empty lines missing between them.",
            len(cut),
            _kept(
                split.sentence_example(sentence, f"{split.lengths[sentence] + 2:,} tokens: ")
                for sentence in longest.tolist()
            ),
        )
    alone = np.flatnonzero(np.diff(starts) == 1)
    if 2 * len(alone) > num_sentences:
        yield Finding(
            "warning",
            "lone words",
            f"{split.name}: {_part(len(alone), num_sentences, 'sentence')} of only one word",
            "The model sees nothing around it; is there an empty line after every word?",
            len(alone),
            _kept(map(split.sentence_example, alone.tolist())),
        )


# Words for findings


def _kept(examples: Iterable[Example]) -> tuple[Example, ...]:
    return tuple(islice(examples, _KEPT_EXAMPLES))


def _number(count: int, noun: str, nouns: str = "") -> str:
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def _part(count: int, total: int, noun: str) -> str:
    """So many of so many, and their share."""
    return f"{count:,} of {_number(total, noun)} ({share(count, total)})"


def _listed(types: Mapping[str, int]) -> str:
    shown = ", ".join(f"{kind:.30} ({n:,})" for kind, n in islice(types.items(), 10))
    return shown + (", ..." if len(types) > 10 else "")


def _gravity(count: int, total: int) -> str:
    """How grave something is that concerns so many of so many."""
    return "warning" if count > _WORTH_A_WARNING * total else "note"
